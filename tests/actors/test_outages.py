"""A storage that fails for a while, and one that is gone: what the records of a run do then. No cluster."""

import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from nlray.actors.control.journal import Journal
from nlray.actors.control.outages import Outage
from nlray.actors.control.run_lock import FolderLostError, Owner, claim, hold
from nlray.actors.faults import RunFailedError
from nlray.metrics import read_events, read_json, read_rows
from nlray.storage import may_pass


class ClientError(Exception):
    """What a store's client raises: no OSError."""


class AwayFileSystem(MemoryFileSystem):
    """A store that does not answer while `error` is set."""

    protocol = "away"
    store: dict = {}  # noqa: RUF012 - of the class, as in MemoryFileSystem
    pseudo_dirs = [""]  # noqa: RUF012
    error: Exception | None = None

    def pipe_file(self, *args, **options):
        if AwayFileSystem.error is not None:
            raise AwayFileSystem.error
        return super().pipe_file(*args, **options)


ClientError.__module__ = "store.client"
fsspec.register_implementation("away", AwayFileSystem, clobber=True)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes: a write ends in the middle, and the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def open_journal(url: str, limit_s: float = 1000.0) -> Journal:
    owner = Owner(run="r")
    claim(url, owner)
    return Journal(url, hold(url, owner, wait_s=0), limit_s)


def row(step: int) -> dict:
    return {"step": step, "tokens": step, "loss": 1.0, "levels": {}}


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nlray.actors.control.outages.RETRY_S", 0.0)
    monkeypatch.setattr("nlray.actors.control.run_lock.SETTLE_S", 0.01)


def test_a_full_disk_is_waited_out_and_nothing_is_lost_or_written_twice(tmp_path):
    run = tmp_path / "run"
    journal = open_journal(str(run))
    journal.add_rows([row(1)])
    journal.save_state({"status": "running", "step": 1})
    assert journal.durable_step == 1
    with full_disk(os.path.getsize(run / "metrics.jsonl") + 20):
        for step in range(2, 30):
            journal.add_rows([row(step)])
        journal.save_state({"status": "running", "step": 29, "much": "x" * 1000})
        assert not journal.catch_up()
        assert journal.durable_step == 1 and [r["step"] for r in read_rows(str(run))] == [1]
        assert (run / "metrics.jsonl").read_bytes().endswith(b"\n")
        assert read_json(str(run / "state.json"))["step"] == 1
    assert journal.catch_up()
    assert journal.durable_step == 29 and [r["step"] for r in read_rows(str(run))] == list(range(1, 30))
    assert read_json(str(run / "state.json"))["step"] == 29
    texts = [event["text"] for event in read_events(str(run))]
    assert [text.split(";")[0] for text in texts] == [
        f"run.dir: {run} cannot be written: File too large",
        f"run.dir: {run} can be written again, after 0 s",
    ]
    assert texts == journal.since(0, 0)[1]
    assert not list(run.rglob("*.part"))
    journal.close()


@pytest.mark.parametrize("error", [ClientError("no answer"), OSError("slow down"), TimeoutError(), ConnectionRefusedError(111, "refused")])
def test_a_store_that_does_not_answer_is_waited_out(error):
    url = f"away://{type(error).__name__}/run"
    journal = open_journal(url)
    journal.add_rows([row(1)])
    try:
        AwayFileSystem.error = error
        journal.save_state({"status": "running"})
        assert not journal.catch_up()
        journal.write_summary({"loss": float("nan")})
        with pytest.raises(type(error)):
            journal.add_rows([row(2)])
            journal.flush()
    finally:
        AwayFileSystem.error = None
    assert journal.catch_up()
    journal.flush()
    assert read_json(f"{url}/state.json") == {"status": "running"} and read_json(f"{url}/summary.json") == {"loss": None}
    assert [r["step"] for r in read_rows(url)] == [1, 2]
    assert len([text for text in journal.since(0, 0)[1] if "cannot be written" in text]) == 1


def test_a_storage_that_stays_away_ends_the_run_with_its_reason(tmp_path):
    journal = open_journal(str(tmp_path / "run"), limit_s=0.0)
    with full_disk(10):
        journal.add_rows([row(1)])
        with pytest.raises(RunFailedError, match=r"run.dir: .*/run could not be written for 0 s \(run.timeout_s\): File too large"):
            journal.catch_up()


@pytest.mark.parametrize("removed", ["run", "run/metrics.jsonl", "run/.lock"])
def test_what_is_removed_while_a_run_goes_on_is_an_error_at_the_next_write_and_is_not_made_again(removed, tmp_path):
    run = tmp_path / "run"
    journal = open_journal(str(run))
    journal.add_rows([row(1)])
    path = tmp_path / removed
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FolderLostError, match=r"run.dir: .*(removed|not there)"):
        journal.add_rows([row(2)])
    left = sorted(tmp_path.rglob("*"))
    for write in (lambda: journal.save_state({"status": "failed"}), lambda: journal.write_summary({}), lambda: journal.add_event("end")):
        with pytest.raises(FolderLostError):
            write()
    journal.close()
    assert journal.is_lost and sorted(tmp_path.rglob("*")) == left
    assert journal.since(0, 0)[0][-1] == row(2) and journal.since(0, 0)[1][-1] == "end"


def test_a_folder_that_was_replaced_by_another_run_is_lost_too(tmp_path):
    journal = open_journal(str(tmp_path / "run"))
    shutil.move(tmp_path / "run", tmp_path / "moved")
    other = open_journal(str(tmp_path / "run"))
    other.save_state({"status": "running"})
    with pytest.raises(FolderLostError, match="belongs to another launch now"):
        journal.save_state({"status": "completed"})
    assert json.loads((tmp_path / "run" / "state.json").read_text()) == {"status": "running"}
    other.close()


def test_a_part_that_cannot_be_written_is_removed(tmp_path):
    import torch

    from nlray.checkpoint import write_part

    with full_disk(100), pytest.raises(OSError, match="File too large"):
        write_part(str(tmp_path / "step_000000001"), "sequence_0.safetensors", {"param/a": torch.zeros(1000)})
    assert list((tmp_path / "step_000000001").iterdir()) == []


def test_what_will_not_pass_is_not_waited_for():
    outage = Outage("it", 1000.0, lambda text: None)
    for error in (PermissionError(13, "denied"), OSError(30, "Read-only file system"), FileNotFoundError("gone"), TypeError("a mistake")):
        assert not may_pass(error)
        with pytest.raises(type(error)):
            outage.meet(error)
    assert outage.error is None and may_pass(OSError(28, "No space left on device")) and may_pass(ClientError())
