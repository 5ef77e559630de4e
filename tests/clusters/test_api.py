"""The Python API: the functions of `nlray`, on real runs."""

import json
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch

import nlray
from nlray.actors.faults import RunFailedError
from nlray.checkpoint import describe, parameter_digest
from nlray.config.loading import config_to_yaml, load_config
from nlray.errors import RemoteTimeoutError, UserError

ROOT = Path(__file__).parents[2]
SMALL = {
    "run": {"steps": 12, "timeout_s": 60},
    "model": {"dim": 32, "layers": 1, "heads": 2, "seq_len": 32},
    "sequence": {"global_batch": 4},
    "eval": {"sequences": 4},
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=16, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_overrides_are_sections_or_dotted_keys():
    config = nlray.load_config("tiny", run={"steps": 7}, **{"sequence.workers": 2, "data.sources": [Path("a.txt")]})
    assert config == load_config("tiny", ["run.steps=7", "sequence.workers=2", "data.sources=[a.txt]"])
    assert nlray.load_config(config, run={"seed": 3}) == load_config(
        "tiny", ["run.steps=7", "run.seed=3", *["sequence.workers=2", "data.sources=[a.txt]"]]
    )


def test_a_configuration_stays_as_it_is():
    config = load_config("small", ["run.name=010", "sequence.optimizer.betas=[0.9, 0.99]"])
    assert nlray.load_config(config) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"run": {"step": 7}}, "run.step"),
        ({"run": {"steps": 0}}, "run.steps is 0"),
        ({"model": {"dim": {1, 2}}}, "is no value of the configuration"),
        ({"a b": 1}, "argument"),
    ],
)
def test_a_mistake_is_one_line(overrides, message):
    with pytest.raises(UserError, match=message) as error:
        nlray.load_config("tiny", **overrides)
    assert "\n" not in str(error.value)


def test_a_start_from_a_folder_is_read_once_and_asks_for_trust(tmp_path, monkeypatch):
    """What the folder names is confirmed before anything starts; the run is named after the folder, and its own folder is absolute."""
    (tmp_path / "source").mkdir()
    config = load_config("tiny", ["sequence.optimizer.name=somebodys:Class"])
    (tmp_path / "source/config.yaml").write_text(config_to_yaml(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nlray.actors.launch.launch", lambda config, **options: SimpleNamespace(client=None))
    with pytest.raises(UserError, match=r"somebodys:Class.*--trust"):
        nlray.train(init="source", wait=False)
    run = nlray.train(init="source", trust=True, wait=False)
    assert run.name.startswith("source-") and run.dir == f"{tmp_path}/runs/{run.name}"
    assert run.config.sequence.optimizer.name == "somebodys:Class"


def test_import_is_light_and_lists_its_names():
    code = "import sys, nlray\n"
    code += (
        "slow = {'torch', 'ray', 'numpy', 'yaml', 'typer'}; print(sorted(slow & set(sys.modules)), set(nlray.__all__) <= set(dir(nlray)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[] True"
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        nlray.trian  # noqa: B018


def test_a_run_is_trained_looked_at_and_loaded(cluster, tmp_path):
    run = nlray.train("tiny", **SMALL, **{"run.dir": tmp_path / "run"})
    assert run.name.startswith("tiny-") and not ray.util.list_named_actors(all_namespaces=True)

    metrics = run.metrics()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert metrics["loss"].to_pylist() == [row["loss"] for row in rows] and metrics.num_rows == 12
    assert metrics["levels.slow.version"].to_pylist() == [row["levels"]["slow"]["version"] for row in rows]

    found = nlray.attach(str(tmp_path / "run"))
    status = found.status()
    assert (status.state, status.step, status.actors, found.is_open) == ("completed", 12, (), False)
    assert found.stop().summary == status.summary == json.loads((tmp_path / "run/summary.json").read_text())
    assert found.events() and found.events()[-1]["step"] == 12
    with pytest.raises(UserError, match="has ended: completed"):
        found.scale(slow=2)

    model, tokenizer = found.load_model()
    assert parameter_digest({name: describe(p) for name, p in model.named_parameters()}) == status.summary["digest"]
    assert torch.isfinite(model.token_losses(torch.from_numpy(tokenizer.encode("some text").astype("int64"))[None])[0]).all()


def test_a_run_in_the_background_is_scaled_and_stopped(cluster, tmp_path):
    with nlray.train("tiny", **SMALL | {"run": {"steps": 100_000, "dir": tmp_path / "run"}}, wait=False) as run:
        assert run.is_open and run.status().state in ("starting", "running")
        with pytest.raises(UserError, match=r"slow|at most"):
            run.scale(slow=1000)
        run.scale(slow=2)
        with pytest.raises(RemoteTimeoutError, match=r"waited 0\.1 s for the end of run"):
            run.wait(timeout_s=0.1)
        other = nlray.attach(run.name, address="auto")
        assert other.status().name == run.name
        end = other.stop()
        assert end.state == "stopped" and run.wait().summary == end.summary
        assert run.status().summary is not None or run.status().state == "stopped"


def test_a_run_that_fails_raises(cluster, tmp_path):
    with pytest.raises(UserError, match="ranks is 1000"):
        nlray.train("tiny", **SMALL, **{"run.dir": tmp_path / "run", "cms.levels.slow.ranks": 1000})
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "' + "good words " * 200 + '"}\n' + "{broken\n")
    with pytest.raises((RunFailedError, UserError), match=r"bad.jsonl"):
        nlray.train("tiny", **SMALL, **{"run.dir": tmp_path / "run", "data.sources": [bad]})


def test_the_example_runs(cluster, capsys):
    names = runpy.run_path(str(ROOT / "examples/first_run.py"))
    printed = capsys.readouterr().out
    assert names["metrics"].num_rows == 40 and "completed" in printed and names["end"].summary["digest"] in printed
