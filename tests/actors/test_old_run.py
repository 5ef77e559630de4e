"""A run that an earlier version of nlray began: its keys were `memory.*` and `model.*` where today's are `cms.*` and `model.titans.*`.

`tests/data/run_before_cms` is the run's folder, stopped at step 6 of 12; `tests/data/run_before_cms.jsonl` is its text. The version that
wrote it continued it with the losses below.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nlray.actors.preparation import check_resume, find_checkpoint, resume_config
from nlray.config import Config
from nlray.config.loading import config_to_yaml, load_config, parse_run_config
from nlray.errors import UserError
from tests.actors.conftest import run_to_end

DATA = Path(__file__).parents[1] / "data"
TEXT = f"data.sources=[{DATA / 'run_before_cms.jsonl'}]"
LOSSES = {7: 5.441832542, 8: 5.476391792, 9: 5.378039837, 10: 5.381177425, 11: 5.481253624, 12: 5.391762733}
EVAL_LOSS = 5.340151280


@pytest.fixture
def old(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that makes a copy of the run."""
    return lambda name: Path(shutil.copytree(DATA / "run_before_cms", tmp_path / name))


def test_the_keys_of_before_mean_what_they_meant(old: Callable[[str], Path]) -> None:
    config = resume_config(str(old("run")), [])
    assert (config.model.titans.phase, config.model.titans.adapt_q, config.model.titans.chunk_sizes) == ("adaptive", True, {"k": 4})
    assert (config.cms.hidden, config.cms.mlp, config.model.titans.chunk_size) == (8, "swiglu", 8)
    medium = config.levels["medium"]
    assert (medium.delay, medium.local_update, medium.rule, medium.optimizer.name) == (2, True, "dgd", "muon")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.titans.chunk_size=4", "model.titans.chunk_size is 4; a resumed run keeps 8"),
        ("cms.hidden=16", "cms.hidden is 16; a resumed run keeps 8"),
        ("cms.levels.medium.delay=3", "cms.levels.medium.delay is 3; a resumed run keeps 2"),
        ("optimizer.name=adamw", "sequence.optimizer.name is adamw; a resumed run keeps momentum"),
    ],
)
def test_what_a_resumed_run_keeps_is_told_by_todays_keys(old: Callable[[str], Path], override: str, message: str) -> None:
    run = str(old("run"))
    checkpoint = find_checkpoint(run, None, print)
    check_resume(resume_config(run, ["cms.levels.medium.optimizer.lr=0.5", "model.titans.recompute_chunks=true"]), checkpoint)
    with pytest.raises(UserError) as caught:
        check_resume(resume_config(run, [override]), checkpoint)
    assert str(caught.value) == message


def test_an_old_run_is_resumed_to_its_end(old: Callable[[str], Path], cluster: None) -> None:
    def resumed(run: Path) -> tuple[Config, str]:
        config = resume_config(str(run), [TEXT])
        status, rows, _ = run_to_end(config, resume=True)
        assert status.state == "completed" and status.summary is not None
        assert {row["step"]: row["loss"] for row in rows} == pytest.approx(LOSSES, abs=1e-4)
        assert status.summary["eval_loss"] == pytest.approx(EVAL_LOSS, abs=1e-4)
        return parse_run_config("config.yaml", (run / "config.yaml").read_text()), status.summary["digest"]

    today = old("today")
    (today / "config.yaml").write_text(config_to_yaml(parse_run_config("config.yaml", (today / "config.yaml").read_text())))
    config, digest = resumed(run := old("run"))
    assert resumed(today)[1] == digest
    # What the run wrote now has today's keys, and no old ones.
    assert load_config(str(run / "config.yaml")) == config and "memory:" not in (run / "config.yaml").read_text().split("titans:")[0]


def test_training_may_start_from_an_old_run(old: Callable[[str], Path]) -> None:
    config = load_config(None, [f"init={old('run')}", "cms.levels.medium.delay=0"])
    assert (config.model.titans.phase, config.cms.mlp, config.levels["medium"].delay) == ("adaptive", "swiglu", 0)
