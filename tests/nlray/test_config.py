"""The configuration: presets load, overrides merge, mistakes are one line that names the key, and it goes round through YAML."""

from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import nlray
from nlray.clusters.cli import main
from nlray.config import Config, LevelConfig
from nlray.config.loading import (
    PRESETS,
    config_from_dict,
    config_to_yaml,
    default_run_name,
    load_config,
    parse_config,
    parse_run_config,
    with_absolute_paths,
    with_run,
)
from nlray.errors import UserError

PRESET_FILES = sorted((Path(__file__).parents[2] / "nlray" / "config" / "presets").glob("*.yaml"))


def test_every_preset_file_is_a_preset():
    assert {path.stem for path in PRESET_FILES} == set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_loads_and_goes_round(preset, tmp_path):
    config = load_config(preset)
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(config))
    assert load_config(str(path)) == config
    assert config_from_dict(yaml.safe_load(config_to_yaml(config))) == config


def test_no_source_is_tiny():
    assert load_config(None) == load_config("tiny")
    assert load_config(None).model.kind == "hope"


@settings(max_examples=25, deadline=None)
@given(
    steps=st.integers(1, 10**6),
    period=st.integers(1, 1000),
    share=st.floats(0, 1, allow_nan=False),
    lr=st.floats(1e-6, 1, allow_nan=False),
    workers=st.integers(1, 8),
    name=st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,10}", fullmatch=True).filter(lambda n: n != "sequence"),
)
def test_any_configuration_goes_round(steps, period, share, lr, workers, name):
    plain = {
        "run": {"steps": steps},
        "cms": {"levels": {name: {"update_period": period, "delay": int(share * period), "optimizer": {"lr": lr}}}},
        "sequence": {"workers": workers, "global_batch": 3 * workers},
    }
    config = config_from_dict(plain)
    assert config_from_dict(yaml.safe_load(config_to_yaml(config))) == config
    assert config.levels[name].visible_delay == int(share * period)


def test_overrides_win_over_the_file_and_later_ones_over_earlier(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("run: {steps: 7}\nmodel: {dim: 64}\ncms: {levels: {a: {update_period: 2}}}\n")
    config = load_config(str(path), ["run.steps=8", "run.steps=9", "model.titans.objective=l2"])
    assert (config.run.steps, config.model.dim, config.model.titans.objective, list(config.levels)) == (9, 64, "l2", ["a"])


def test_null_removes_a_level_and_a_new_name_adds_one():
    config = load_config("tiny", ["cms.levels.slow=null", "cms.levels.rare={update_period: 100}", "cms.levels.rare.delay=3"])
    assert list(config.levels) == ["fast", "medium", "slowest", "rare"] and config.levels["rare"].delay == 3


def test_levels_are_ordered_by_period():
    assert list(load_config("tiny", ["cms.levels.fast.update_period=32"]).levels) == ["medium", "slow", "fast", "slowest"]


def test_defaults_hold_where_a_level_says_nothing():
    config = load_config("tiny", ["cms.defaults.optimizer.lr=0.5", "cms.defaults.ranks=2", "cms.levels.slow.ranks=3"])
    assert {level.optimizer.lr for level in config.levels.values()} == {0.5}
    assert [level.ranks for level in config.levels.values()] == [2, 2, 3, 2]


def test_gradients_are_taken_in_every_so_many_steps_of_a_period():
    assert load_config("tiny", ["cms.levels.slow.grad_every=4"]).levels["slow"].grad_every == 4
    with pytest.raises(UserError, match=r"cms\.levels\.slow\.grad_every is 3; allowed: a divisor of update_period=16"):
        load_config("tiny", ["cms.levels.slow.grad_every=3"])


def test_a_state_that_grows_with_the_text_is_not_carried():
    with pytest.raises(
        UserError, match=r"model\.titans\.carry_state is true; allowed for kind hope_attention, whose state grows .*: false"
    ):
        load_config("tiny", ["model.titans.carry_state=true", "model.kind=hope_attention"])
    with pytest.raises(UserError, match=r"data\.stream\.lane_blocks is 0; allowed: 1 or more"):
        load_config("tiny", ["model.titans.carry_state=true", "data.stream.lane_blocks=0"])


def test_options_of_an_optimizer_are_kept_as_they_came():
    options = "{slow_every: [16, 128], beta3: 0.99}"
    config = load_config("tiny", ["cms.defaults.optimizer.name=m3", f"cms.defaults.optimizer.options={options}"])
    assert {level.optimizer.name for level in config.levels.values()} == {"m3"}
    assert all(level.optimizer.options == {"slow_every": [16, 128], "beta3": 0.99} for level in config.levels.values())
    assert config_from_dict(yaml.safe_load(config_to_yaml(config))) == config


def test_options_of_the_defaults_hold_for_levels_with_the_same_optimizer_only():
    defaults = "cms.defaults.optimizer={name: m3, lr: 0.5, options: {beta3: 0.99}}"
    own = ["cms.levels.slow.optimizer.name=adamw", "cms.levels.medium.optimizer.options.alpha=1.0"]
    levels = load_config("tiny", [defaults, *own]).levels
    assert levels["slow"].optimizer.options == {} and levels["slow"].optimizer.lr == 0.5
    assert levels["medium"].optimizer.options == {"beta3": 0.99, "alpha": 1.0}
    assert levels["fast"].optimizer.options == {"beta3": 0.99}


def test_what_a_section_does_not_set_is_as_without_the_section():
    resources = (
        load_config("tiny", ["cms.levels.slow.resources.custom={far: 1}", "cms.defaults.resources.threads=2"]).levels["slow"].resources
    )
    assert (resources.cpus, resources.threads, resources.custom) == (0.1, 2, {"far": 1.0})
    # A section of which only some keys are given is made by its class: so every default must be that of the class.
    sections = [(Config, f) for f in fields(Config)]
    for schema, f in sections:
        if is_dataclass(f.type):
            assert f.default_factory() == f.type(), (schema, f.name)
            sections += [(f.type, g) for g in fields(f.type)]
        elif f.type == dict[str, LevelConfig]:
            sections += [(LevelConfig, g) for g in fields(LevelConfig)]


@pytest.mark.parametrize(("period", "delay", "visible"), [(1, None, 0), (4, None, 4), (64, None, 8), (64, 0, 0), (1, 1, 1)])
def test_delay_in_force(period, delay, visible):
    config = config_from_dict({"cms": {"levels": {"a": {"update_period": period, "delay": delay}}}})
    assert config.levels["a"].visible_delay == visible


@pytest.mark.parametrize(("value", "biases"), [("4", (4.0,) * 4), ("[1, 2.5, -3, 4e0]", (1.0, 2.5, -3.0, 4.0))])
def test_the_decay_has_one_bias_or_one_for_each_head(value, biases):
    config = load_config("tiny", [f"model.titans.decay_bias={value}"])
    assert config.model.decay_biases == biases
    assert config_from_dict(yaml.safe_load(config_to_yaml(config))) == config


@pytest.mark.parametrize(("kind", "count"), [("hope", 4), ("hope_attention", 4), ("titans", 0), ("transformer", 0)])
def test_kinds_without_cms_have_no_levels(kind, count):
    assert len(load_config("tiny", [f"model.kind={kind}"]).levels) == count


def test_a_path_alone_is_a_source():
    assert [s.path for s in load_config("tiny", ["data.sources=[a.parquet,b/]"]).data.sources] == ["a.parquet", "b/"]
    assert [s.path for s in load_config("tiny", ["data.sources=a.parquet"]).data.sources] == ["a.parquet"]


def test_names_of_runs():
    assert default_run_name(None, [], "S") == "tiny-S"
    assert default_run_name("hope-1.3b", ["init=a/b"], "S") == "hope-1.3b-S"
    assert default_run_name("some/where/mine.yaml", [], "S") == "mine-S"
    assert default_run_name(None, ["init=runs/stacked"], "S") == "stacked-S"
    assert load_config("tiny", default_name="n").run.name == "n"
    assert load_config("tiny", ["run.name=own"], default_name="n").run.name == "own"
    assert with_run(Config(cms=load_config("tiny").cms), dir="d").run.dir == "d"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["nonsense"], ["nonsense", "key=value"]),
        (["modle.dim=3"], ["modle", "model"]),
        (["model.dims=3"], ["model.dims", "model.dim"]),
        (["cms.levels.slow.period=3"], ["cms.levels.slow.period"]),
        (["cms.levels.slow.optimizer.beta=3"], ["cms.levels.slow.optimizer.beta", "betas"]),
        (["cms.defaults.period=3"], ["cms.defaults.period"]),
        (
            ["cms.levels.slow.optimizer.name=delta_momentm"],
            ["cms.levels.slow.optimizer.name is", "did you mean 'delta_momentum'", "m3"],
        ),
        (["sequence.optimizer.name=torch.optim.SGD"], ["sequence.optimizer.name", "package.module:Class"]),
        (["sequence.optimizer.options=3"], ["sequence.optimizer.options is 3", "a mapping"]),
        (["model.dim=wide"], ["model.dim", "wide"]),
        (["model.kind=mamba"], ["model.kind", "mamba", "transformer"]),
        (["model.heads=3"], ["model.heads", "3", "128"]),
        (["model.titans.rule=delta"], ["model.titans.phase is self_modifying", "model.titans.rule=delta", "static"]),
        (
            ["model.titans.rule=hebbian", "model.titans.phase=static", "model.titans.memory=mlp"],
            ["model.titans.memory is mlp", "model.titans.rule=hebbian", "matrix"],
        ),
        (
            ["model.titans.rule=gated_delta", "model.titans.phase=static", "model.titans.objective=l2"],
            ["model.titans.objective is l2", "gated_delta", "dot"],
        ),
        (
            ["model.titans.rule=delta", "model.titans.phase=static", "model.titans.momentum=true"],
            ["model.titans.momentum is true", "model.titans.rule=delta", "false"],
        ),
        (["model.titans.rule=gd"], ["model.titans.objective is dot", "model.titans.rule=gd and model.titans.phase=self_modifying", "l2"]),
        (
            ["model.titans.rule=gd", "model.titans.phase=static", "model.titans.memory=mlp"],
            ["model.titans.objective is dot", "model.titans.memory=mlp", "l2"],
        ),
        (["model.titans.momentum=true"], ["model.titans.momentum is true", "model.titans.phase=self_modifying", "false"]),
        (
            ["model.titans.phase=static", "model.titans.adapt_q=true"],
            ["model.titans.adapt_q is true", "model.titans.phase=static", "false"],
        ),
        (["model.titans.hidden=8"], ["model.titans.hidden is 8", "model.titans.memory=matrix", "null"]),
        (["model.titans.memory=mlp", "model.titans.hidden=0"], ["model.titans.hidden is 0", "1 to 1048576"]),
        (["model.titans.chunk_sizes.kk=8"], ["model.titans.chunk_sizes.kk", "did you mean k?", "self_modifying: k, v, eta, alpha, mem"]),
        (["model.titans.memory=matrx"], ["model.titans.memory is 'matrx'", "did you mean 'matrix'?", "mlp, or package.module:Class"]),
        (["model.titans.decay_bias=[1,2]"], ["model.titans.decay_bias is [1.0, 2.0]", "model.heads=4"]),
        (["model.titans.decay_bias=[1,2,3,slow]"], ["model.titans.decay_bias is", "slow", "a list, each a number"]),
        (["model.titans.decay_bias=null"], ["model.titans.decay_bias is null", "a number"]),
        (["cms.levels.slow.update_period=0"], ["cms.levels.slow.update_period", "0", "1 or more"]),
        (["cms.levels.slow.delay=17"], ["cms.levels.slow.delay", "17", "0 to", "16"]),
        (["cms.levels.slow.optimizer.lr=0"], ["cms.levels.slow.optimizer.lr", "more than 0"]),
        (["sequence.optimizer.schedule.warmup=-1"], ["sequence.optimizer.schedule.warmup is -1"]),
        (["cms.levels.slow.optimizer.schedule.final=2"], ["cms.levels.slow.optimizer.schedule.final is 2"]),
        (["cms.levels.medium.resources.cpus=-1"], ["cms.levels.medium.resources.cpus is -1"]),
        (["sequence.optimizer.lr=-1"], ["sequence.optimizer.lr", "-1"]),
        (["sequence.workers=3"], ["sequence.global_batch", "8", "sequence.workers=3"]),
        (["sequence.micro_batch=3"], ["sequence.micro_batch", "3", "8"]),
        (["sequence.resources.gpus=some"], ["sequence.resources.gpus", "some"]),
        (["data.eval_fraction=1"], ["data.eval_fraction", "1"]),
        (["data.sources=[]"], ["data.sources is []", "one source or more"]),
        (["data.sources=[{path: a, wieght: 2}]"], ["data.sources[0].wieght", "weight"]),
        (["cms.levels.sequence={update_period: 2}"], ["cms.levels.sequence", "not one of sequence, standby, backup, conductor"]),
        (["cms.levels.backup={update_period: 2}"], ["cms.levels.backup", "not one of sequence, standby, backup, conductor"]),
        (
            ["cms.levels.mdi.update_period=4"],
            ["cms.levels.mdi.update_period: no level mdi; did you mean 'medium'?", "levels here: fast, medium, slow, slowest;"],
        ),
        (["cms.levels.glacial={ranks: 2}"], ["cms.levels.glacial.update_period: has no value; levels here: fast", "adds one"]),
        (["cms={levels: {mdi: {ranks: 2}}}"], ["cms.levels.mdi.update_period: has no value; did you mean 'medium'?"]),
        (["cms.levels.slow=null", "cms.levels.slow.ranks=2"], ["cms.levels.slow.ranks: no level slow;", "fast, medium, slowest;"]),
        (
            ["cms.levels.fast=null", "cms.levels.medium=null", "cms.levels.slow=null", "cms.levels.slowest=null"],
            ["cms.levels"],
        ),
    ],
)
def test_mistake_is_one_line_that_names_the_key(overrides, words):
    with pytest.raises(UserError) as caught:
        load_config("tiny", overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"), [("run: [1, 2", ["mine.yaml", "YAML"]), ("- a\n- b\n", ["mine.yaml", "mapping"]), ("run: 3\n", ["run", "3"])]
)
def test_file_that_is_no_configuration(text, words, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(str(path))
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'hope-340m'"):
        load_config("hope-340")


def test_every_path_of_the_configuration_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    sources = "data.sources=[~/c.jsonl,file:///data/d,'a::b.txt',s3://bucket/~/e,'stdlib:']"
    config = load_config("tiny", [sources, "data.tokenizer=~/t.json", "run.dir=~/runs/x"], default_name="x")
    absolute = with_absolute_paths(replace(config, init="runs/y"))
    assert [source.path for source in absolute.data.sources] == [
        f"{tmp_path}/home/c.jsonl",
        "/data/d",
        f"{tmp_path}/a::b.txt",
        "s3://bucket/~/e",
        "stdlib:",
    ]
    assert absolute.data.tokenizer == f"{tmp_path}/home/t.json"
    assert (absolute.run.dir, absolute.init) == (f"{tmp_path}/home/runs/x", f"{tmp_path}/runs/y")
    assert with_absolute_paths(absolute) == absolute
    with pytest.raises(UserError, match=r"^run.dir: ~nobody-here/x: .* no home folder"):
        with_absolute_paths(load_config("tiny", ["run.dir=~nobody-here/x"]))


def test_a_configuration_file_in_the_home_folder_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("run: {steps: 7}\nmodel: {kind: transformer}\n")
    assert load_config("~/mine.yaml").run.steps == 7
    assert load_config(f"file://{tmp_path}/mine.yaml").run.steps == 7


def test_what_a_run_of_an_earlier_version_wrote_means_the_same():
    """Every source had `text_column: text`, which text files refuse today where a user names it."""
    written = config_to_yaml(load_config("tiny", ["data.sources=[a.parquet,{path: b.parquet, text_column: body}]"]))
    earlier = written.replace("text_column: null", "text_column: text")
    assert earlier != written
    assert parse_run_config("config.yaml", earlier) == parse_run_config("config.yaml", written)
    assert [source.text_column for source in parse_run_config("config.yaml", earlier).data.sources] == [None, "body"]
    assert parse_config("mine.yaml", earlier).data.sources[0].text_column == "text"


@pytest.mark.parametrize(("earlier", "today"), [("none", False), ("summed", True)])
def test_a_level_of_an_earlier_version_learns_as_it_did(earlier, today):
    written = config_to_yaml(load_config("tiny", ["cms.levels.fast.delay=1"]))
    old = written.replace("local_update: false", f"local_update: {earlier}\n      predict: 0.0").replace("\ncms:", "\nmemory:")
    assert old != written
    assert {level.local_update for level in parse_run_config("config.yaml", old).levels.values()} == {today}


@pytest.mark.parametrize(("key", "value"), [("predict", "2.0"), ("local_update", "own")])
def test_a_level_of_an_earlier_version_that_nlray_cannot_continue_is_told(key, value):
    old = config_to_yaml(load_config("tiny")).replace("local_update: false", f"{key}: {value}").replace("\ncms:", "\nmemory:")
    with pytest.raises(UserError, match=rf"memory\.levels\.fast\.{key} is {value}, which nlray does not do any more; .*true"):
        parse_run_config("config.yaml", old)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("memory.levels.fast.update_period=2", "memory.levels.fast.update_period: renamed cms.levels.fast.update_period"),
        ("memory.levels={new: {update_period: 2, ranks: 3}}", "memory.levels.new: renamed cms.levels.new"),
        ("memory.hidden=8", "memory.hidden: renamed cms.hidden"),
        ("memory=null", "memory: renamed cms"),
        ("model.phase=static", "model.phase: renamed model.titans.phase"),
        ("model.memory=mlp", "model.memory: renamed model.titans.memory"),
        ("model.memory_options.width=3", "model.memory_options.width: renamed model.titans.options.width"),
        ("model.memory_chunks={k: 16}", "model.memory_chunks.k: renamed model.titans.chunk_sizes.k"),
        ("model={dim: 8, conv_width: 2}", "model.conv_width: renamed model.titans.conv_width"),
    ],
)
def test_an_old_key_names_the_new_one(override, message, tmp_path, capsys):
    with pytest.raises(UserError) as caught:
        load_config("tiny", [override])
    assert str(caught.value) == message
    for command in (["train", "tiny"], ["levels"], ["resume", str(tmp_path / "run")]):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "config.yaml").write_text(config_to_yaml(load_config("tiny")))
        assert main([*command, override]) == 2
        assert capsys.readouterr().err == f"nlray: error: {message}\n"


def test_a_file_with_old_keys_names_all_of_them():
    with pytest.raises(UserError) as caught:
        parse_config("mine.yaml", "model: {dim: 64, rule: gd, memory_hidden: 8}\nmemory: {hidden: 8, mlp: gelu}")
    renamed = {"model.rule": "model.titans.rule", "model.memory_hidden": "model.titans.hidden", "memory": "cms"}
    assert str(caught.value) == "; ".join(f"{old}: renamed {new}" for old, new in renamed.items())


def optimizers_of(config: Config) -> dict[str, tuple[str, float, dict]]:
    """Return name, learning rate and options of the optimizers of the sequence and of every level."""
    found = {"sequence": config.sequence.optimizer} | {name: level.optimizer for name, level in config.levels.items()}
    return {name: (optimizer.name, optimizer.lr, optimizer.options) for name, optimizer in found.items()}


def test_one_optimizer_holds_for_the_sequence_and_the_levels_unless_they_say_otherwise():
    m3 = ["optimizer={name: m3, lr: 0.5, options: {slow_every: 32}}", "cms.levels.slowest=null"]
    slow_every = {"slow_every": 32}
    groups = ("sequence", "fast", "medium", "slow")
    assert optimizers_of(load_config("tiny", m3)) == dict.fromkeys(groups, ("m3", 0.5, slow_every))
    own = ["sequence.optimizer={name: adamw}", "cms.defaults.optimizer.lr=0.25", "cms.levels.fast.optimizer={name: muon, lr: 0.125}"]
    assert optimizers_of(load_config("tiny", [*own, *m3])) == {
        "sequence": ("adamw", 0.5, {}),
        "fast": ("muon", 0.125, {}),
        "medium": ("m3", 0.25, slow_every),
        "slow": ("m3", 0.25, slow_every),
    }
    levels = load_config("tiny", ["cms.defaults.optimizer.name=muon", "cms.levels.slow.optimizer.name=m3", *m3]).levels
    assert [level.optimizer.options for level in levels.values()] == [{}, {}, {}]


def test_a_default_on_the_command_line_changes_what_a_run_had(tmp_path):
    """A run's own configuration has every value, and a default beneath them would change nothing."""
    run = load_config("tiny", ["cms.levels.fast.optimizer.lr=0.25", "cms.levels.slow.ranks=2", "run.name=a"])
    text = config_to_yaml(run)
    changed = parse_run_config("config.yaml", text, ["cms.levels.slow.optimizer.lr=0.125", "optimizer.lr=0.5", "cms.defaults.ranks=3"])
    assert {name: lr for name, (_, lr, _) in optimizers_of(changed).items()} == {
        "sequence": 0.5,
        "fast": 0.5,
        "medium": 0.5,
        "slow": 0.125,
        "slowest": 0.5,
    }
    assert {level.ranks for level in changed.levels.values()} == {3}
    assert changed.sequence.optimizer.schedule == run.sequence.optimizer.schedule
    (tmp_path / "config.yaml").write_text(text)
    for config in (load_config(None, [f"init={tmp_path}", "optimizer={name: muon}"]), nlray.load_config(run, optimizer={"name": "muon"})):
        assert {name for name, _, _ in optimizers_of(config).values()} == {"muon"}
        assert config.levels["fast"].optimizer.lr == 0.25 and config.levels["slow"].ranks == 2


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("optimizer.learning_rate=1", "optimizer.learning_rate: unknown key"),
        ("optimizer=adamw", "optimizer is 'adamw'; allowed: keys name, "),
        ("optimizer.lr=-1", "optimizer.lr is -1.0; allowed: more than 0"),
        ("optimizer.name=adam", "cms.levels.fast.optimizer.name is 'adam'; did you mean"),
    ],
)
def test_a_mistake_in_the_default_names_its_key(override, start):
    with pytest.raises(UserError) as caught:
        load_config("tiny", [override])
    assert str(caught.value).startswith(start)
