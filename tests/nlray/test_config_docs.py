"""What keys mean: every key has a docstring, `nlray config` prints values and meanings, and docs/configuration.md is up to date."""

from pathlib import Path

import pytest

from nlray.clusters.cli import main
from nlray.config import OPTIMIZERS
from nlray.config.docs import describe_key, find, keys_of, markdown, sections
from nlray.config.loading import config_to_yaml, load_config
from nlray.errors import UserError

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_docstrings_say():
    assert (ROOT / "docs" / "configuration.md").read_text() == markdown(), "make docs-config"


def test_every_key_has_a_meaning_and_is_found():
    keys = [doc for section, prefix, _ in sections() for doc in keys_of(section, prefix)]
    assert len(keys) > 120 and [doc.key for doc in keys if len(doc.meaning) < 5 or not doc.allowed] == []
    for doc in keys:
        found = find(doc.key)
        assert (found.meaning, found.default, found.section) == (doc.meaning, doc.default, doc.section), doc.key
    assert [doc.key for doc in keys if doc.default == "required"] == [
        "data.sources[0].path",
        "cms.levels.NAME.update_period",
        "cms.levels.NAME.autoscale.max",
        "cms.levels.NAME.autoscale.target_lag",
        "cms.levels.NAME.in_context.chunk_size",
    ]


def test_a_key_has_its_type_range_default_and_meaning():
    assert describe_key("run.stop_after").splitlines()[:2] == ["run.stop_after", "    a whole number, 1 or more, or null; default null"]
    assert "Stop with a checkpoint after this step" in describe_key("run.stop_after")
    name = " ".join(describe_key("cms.levels.fast.optimizer.name").split())
    assert f"default adamw One of {', '.join(OPTIMIZERS)}, or `package.module:Class`" in name
    # A section that extends another has its own default, and the other's docstrings.
    assert "default 0.1" in describe_key("cms.levels.slow.resources.cpus") and "torch threads" in describe_key(
        "cms.levels.slow.resources.threads"
    )
    assert find("sequence.resources.labels[ray.io/pool]").meaning.startswith("Ray node labels")
    assert find("data.sources.1.path").meaning == find("data.sources[0].path").meaning


def test_a_section_has_its_keys():
    assert {"run", "run.steps", "model.titans", "cms.levels.NAME"} <= {line.strip() for line in text_of_all()}
    levels = describe_key("cms.levels.fast")
    assert levels.startswith("cms.levels.fast: One CMS level") and "\ncms.levels.fast.delay\n" in levels
    assert "\ncms.levels.NAME.delay\n" in describe_key("cms.levels") and "\nmodel.titans.phase\n" in describe_key("model.titans")


def text_of_all() -> list[str]:
    """Return the lines that say what all sections and their keys mean."""
    names = (prefix.removesuffix(".") or None for _, prefix, _ in sections())
    return [line.partition(":")[0] for name in names for line in describe_key(name).splitlines()]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("cms.hiden", "cms.hiden: no such key; did you mean cms.hidden?"),
        ("cms.levels.fast.rnks", "cms.levels.fast.rnks: no such key; did you mean cms.levels.fast.ranks?"),
        ("phase", "phase: no such key; did you mean model.titans.phase?"),
        ("run.steps.more", "run.steps.more: no such key; run.steps has no keys of its own"),
        ("memory.hidden", "memory.hidden: renamed cms.hidden"),
        ("model.memory_chunks", "model.memory_chunks: renamed model.titans.chunk_sizes"),
        ("", "'': no such key; sections: run, data, "),
    ],
)
def test_an_unknown_key_names_the_nearest(key, message, capsys):
    with pytest.raises(UserError) as caught:
        describe_key(key)
    assert str(caught.value).startswith(message)
    assert main(["config", "--docs", key]) == 2 and capsys.readouterr().err.startswith(f"nlray: error: {message}")


def test_config_prints_what_a_file_may_hold(tmp_path, capsys):
    assert main(["config", "small", "cms.hidden=64", "optimizer.lr=0.5"]) == 0
    printed = capsys.readouterr().out
    config = load_config("small", ["cms.hidden=64", "optimizer.lr=0.5"])
    assert printed == config_to_yaml(config)
    (tmp_path / "mine.yaml").write_text(printed)
    assert main(["config", str(tmp_path / "mine.yaml")]) == 0 and capsys.readouterr().out == printed
    assert load_config(str(tmp_path / "mine.yaml")) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "run.stpes=3"], "run.stpes: unknown key; did you mean steps?"),
        (["tinny"], "'tinny': no such preset or file"),
        (["--docs", "run", "data"], "--docs run data: allowed is one key"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert main(["config", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"nlray: error: {message}") and printed.err.count("\n") == 1
