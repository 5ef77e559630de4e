"""Configuration files and overrides: a key says what its characters mean, and what is no configuration is one line with its name."""

import os
import re
import subprocess
import sys

import pytest
import yaml

from nlray.config.loading import config_to_yaml, load_config, parse_config, parse_run_config
from nlray.config.yaml_text import dump_yaml, load_yaml
from nlray.errors import UserError

SOURCE = ["data.sources=[a.txt, {path: b.txt, weight: 2}]"]


def message_of(*arguments, **named):
    with pytest.raises(UserError) as caught:
        load_config(*arguments, **named)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


@pytest.mark.parametrize("name", ["20240101_1200", "010", "yes", "1e3", "0x10", "1_000", "12:30", "2026-11-30", "1.10", "on", "a b", "#5"])
def test_a_string_is_the_characters_as_they_are_written(name, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"cms: {{levels: {{a: {{update_period: 2}}}}}}\nrun:\n  name: {name if name[0] != '#' else repr(name)}\n  steps: 010\n")
    for config in load_config(str(path)), load_config(str(path), ["run.name=other", f"run.name={name}"]):
        assert (config.run.name, config.run.steps) == (name, 10)
        # As it is written to the run's folder; other readers of YAML have the same strings.
        text = config_to_yaml(config)
        assert parse_config("again", text) == config
        assert yaml.safe_load(text)["run"]["name"] == name


def test_other_strings_too():
    config = load_config("tiny", [*SOURCE, "data.sources.1.text_column=yes", "data.sources.0.tag_columns=[on, 010, '~']"])
    assert config.data.sources[1].text_column == "yes" and config.data.sources[0].tag_columns == ["on", "010", "~"]
    labels = load_config("tiny", ["sequence.resources.labels={zone: 010}", "sequence.resources.labels[ray.io/pool]=no"]).sequence.resources
    assert labels.labels == {"zone": "010", "ray.io/pool": "no"}


def test_options_without_a_declared_type_are_decimal_numbers_booleans_or_strings():
    options = "{a: 010, b: 1e3, c: true, d: yes, e: 0x10, f: '5', g: [1, 2.5], h: null, i: '1e3'}"
    found = load_config("tiny", [f"model.titans.options={options}"])
    assert found.model.titans.options == {
        "a": 10,
        "b": 1e3,
        "c": True,
        "d": "yes",
        "e": "0x10",
        "f": "5",
        "g": [1, 2.5],
        "h": None,
        "i": "1e3",
    }
    assert parse_config("again", config_to_yaml(found)) == found


def test_a_quoted_number_is_a_number():
    assert load_config("tiny", ['run.steps="300"', "sequence.optimizer.lr='1e-3'"]).run.steps == 300


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"run: {name: \xe9}\n", "not UTF-8 text: .* at byte 12"),
        (b"run: {steps: 1}\nmodel: {}\nrun: {steps: 2}\n", "line 3: .*the key run comes twice"),
        (b"run:\n  steps: 1\n  steps: 2\n", "line 3: .*the key steps comes twice"),
        (b"run: {[1]: 2}\n", "line 1: .*a key is a list"),
        (b"run: {name: \x00}\n", "unacceptable character"),
        (b"run: !!python/object/apply:os.system [x]\n", "line 1: .*python/object"),
        (b"run: {steps: !!int 010}\n", "line 1: .*int"),
        (b"a: &a [*a]\n", "too large or too deep"),
        (b"run: " + b"[" * 1100 + b"]" * 1100, "nested too deep"),
        (b"run: " + b"{a: " * 150 + b"1" + b"}" * 150, "too large or too deep"),
        (b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (i, i, i - 1, i - 1) for i in range(1, 60)), "too large or too deep"),
        (b"a0: &a0 x\n" + b"".join(b"a%d: &a%d [*a%d]\n" % (i, i, i - 1) for i in range(1, 3000)), "too large or too deep"),
        (b"3\n", "is 3; allowed: a mapping of keys"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_line_with_its_name(content, words, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    message = message_of(str(path))
    assert message.startswith(str(path)) and re.search(words, message), message


def test_anchors_and_merges_are_read(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("cms:\n  levels:\n    a: &a {update_period: 2, ranks: 3}\n    b: {<<: *a, update_period: 4}\n")
    levels = load_config(str(path)).levels
    assert [(level.update_period, level.ranks) for level in levels.values()] == [(2, 3), (4, 3)]


def test_a_mark_of_utf_8_is_no_key(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xef\xbb\xbfmodel: {kind: titans}\n")
    assert load_config(str(tmp_path / "mine.yaml")).model.kind == "titans"


def test_what_is_no_file_is_told_and_not_waited_for(tmp_path):
    assert "a folder; allowed: a preset, or a YAML file" in message_of(str(tmp_path))
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "no regular file" in message_of(str(tmp_path / "pipe.yaml"))
    assert "no regular file" in message_of("/dev/null")
    assert "cannot be read" in message_of("x" * 400)


@pytest.mark.parametrize(
    ("overrides", "weights"),
    [
        (["data.sources.0.weight=3"], [3.0, 2.0]),
        (["data.sources[1].weight=3"], [1.0, 3.0]),
        (["data.sources.1={weight: 4}"], [1.0, 4.0]),
        (["data.sources.1=c.txt"], [1.0, 1.0]),
    ],
)
def test_an_override_goes_into_a_list(overrides, weights):
    sources = load_config("tiny", [*SOURCE, *overrides]).data.sources
    assert [s.weight for s in sources] == weights and sources[0].path == "a.txt"


def test_an_override_of_a_list_of_numbers():
    given = ["sequence.optimizer.betas=[0.8, 0.9]", "sequence.optimizer.betas.0=0.5"]
    assert load_config("tiny", given).sequence.optimizer.betas == [0.5, 0.9]


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        ([*SOURCE, "data.sources.2.weight=3"], "data.sources.2.weight: no entry 2 in a list of 2; allowed: 0 to 1"),
        ([*SOURCE, "data.sources.-1.weight=3"], "data.sources.-1.weight: no entry -1"),
        ([*SOURCE, "data.sources.weight=3"], "data.sources.weight: no entry weight"),
        (["data.sources=[]", "data.sources.0.weight=3"], "data.sources.0.weight: no entry 0 in a list of 0"),
        ([*SOURCE, "data.sources.0.weight=-3"], "data.sources[0].weight is -3"),
        (["data.sources.0.weight=3"], "data.sources is {'0': {'weight': 3}}; allowed: a list"),
        (["sequence.optimizer.betas.0=1"], "sequence.optimizer.betas is {'0': 1}; allowed: a list"),
        (["data.sources=['']"], "data.sources[0].path is ''; allowed: a string that is not empty"),
        (["data.sources=[null]"], "data.sources[0] is null; allowed: keys path"),
        (["cms.levels=[]"], "cms.levels is []; allowed: a mapping"),
        (["cms.levels.slow=[]"], "cms.levels.slow is []; allowed: keys update_period"),
        (["cms.defaults.ranks=0"], "cms.defaults.ranks is 0; allowed: 1 or more"),
        (["cms.defaults=3"], "cms.defaults is 3; allowed: keys update_period"),
        (["model=[1]"], "model is [1]; allowed: keys kind"),
        (["run=null"], "run is null; allowed: keys name"),
        (["model.dim.x=3"], "model.dim is {'x': 3}; allowed: a whole number"),
        (["run.steps=3.0"], "run.steps is 3.0; allowed: a whole number"),
        (["run.steps=null"], "run.steps is null; allowed: a whole number"),
        (["run.overwrite=on"], "run.overwrite is 'on'; allowed: true or false"),
        (["data.tokenizer="], "data.tokenizer is null; allowed: a string"),
        (['run.name="a'], "run.name, line 1: not valid YAML"),
        (["run.dir=${oc.env:HOME}"], "run.dir is '${oc.env:HOME}'; allowed: the value itself"),
        (["run.dir=a\udc80"], "run.dir is 'a\\udc80'; allowed: a string that UTF-8 can write"),
        (["run.name=a/b"], "run.name is 'a/b'; allowed: 1 to 128 characters without /"),
        (["run.name=-a"], "run.name is '-a'; allowed: 1 to 128 characters"),
        (["run.name=" + "x" * 300], "run.name is 'xxx"),
        (["a..b=3"], "argument 'a..b=3': not of the form key=value"),
        (["sequence.resources.gpus=1.5"], "sequence.resources.gpus is 1.5; allowed: auto, a whole number, or a share of one"),
        (["sequence.resources.cpus=0.00001"], "sequence.resources.cpus is 1e-05; allowed: 0, or"),
        (
            ["model.attention.rope_scaling={factor: 2, low_freq_factor: 4, high_freq_factor: 4, original_max_positions: 8}"],
            "model.attention.rope_scaling is {",
        ),
    ],
)
def test_what_an_override_cannot_be_is_one_line_that_begins_with_the_key(overrides, start):
    assert message_of("tiny", overrides).startswith(start)


def test_a_run_of_an_older_nlray_is_read():
    text = (
        "run: {timeout_s: 300.0, name: '010'}\nmodel: {norm_eps: 1.0e-06, kind: titans, decay_bias: 5}\nsequence: {resources: {gpus: 1}}\n"
    )
    config = parse_run_config("config.yaml", text.encode())
    assert (config.run.name, config.model.norm_eps, config.model.decay_biases[0], config.sequence.resources.gpus) == ("010", 1e-6, 5.0, 1.0)


@pytest.mark.parametrize("value", ["a: b", "- x", "null", "~", "1.", "+5", "TRUE", "é\n", "<<", "=", "!x", "2026-11-30T10:00:00Z", " a"])
def test_any_string_goes_round(value):
    assert load_yaml("text", dump_yaml({"a": [value, {value: value}]})) == {"a": [value, {value: value}]}


@pytest.mark.parametrize("home", [None, "/nonexistent"])
def test_a_user_without_a_home_folder_has_what_ray_needs(home):
    code = """
import os, pwd
def unknown(uid): raise KeyError(uid)
pwd.getpwuid = unknown
import nlray.actors, nlray.storage
print(os.environ["RAY_AUTH_MODE"], len(os.environ["RAY_AUTH_TOKEN"]))
"""
    left_out = ("HOME", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    environment = {k: v for k, v in os.environ.items() if k not in left_out} | ({"HOME": home} if home else {})
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == ["token", "64"], result.stderr
