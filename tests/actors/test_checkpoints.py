"""A run's checkpoints as the conductor looks after them: what a resume passed over, a damaged one, two under way; without Ray."""

from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nlray.actors.control import checkpoints
from nlray.actors.control.checkpoints import Checkpoints
from nlray.actors.faults import RunFailedError
from nlray.actors.recovery.points import Point
from nlray.actors.types import PartWritten, Role
from nlray.checkpoint import checkpoint_dir, read_manifest, write_manifest, write_part
from nlray.run_plan import SEQUENCE

WORKER = Role(SEQUENCE, 0)


class Call:
    """A call of a host that has written its part; `is_done` says whether the answer is here."""

    def __init__(self, value: PartWritten, is_done: bool) -> None:
        self.value, self.is_done = value, is_done


class FakeHosts:
    """A pool with one host, whose calls have ended or not."""

    def __init__(self, host: "ActorHost") -> None:
        self.host = host

    def actor(self, _: str) -> "ActorHost":
        return self.host

    def finished(self, calls: Collection[Call], timeout_s: float = 0.0) -> tuple[list[Call], list[Call]]:
        return [c for c in calls if c.is_done], [c for c in calls if not c.is_done]

    def answer(self, call: Call, role: Role, host: str, what: str) -> PartWritten:
        return call.value


class ActorHost:
    """Writes a part of one tensor; `slow_steps` are not done before `finish`."""

    def __init__(self) -> None:
        self.write, self.slow_steps, self.calls = SimpleNamespace(remote=self._write), set(), []

    def _write(self, key: Any, url: str, file: str, _: bool) -> Call:
        part = write_part(url, file, {"param/a": torch.full((3,), float(key.step))})
        self.calls.append(Call(PartWritten(step=key.step, part=part, state={"workers": 1}), key.step not in self.slow_steps))
        return self.calls[-1]

    def finish(self) -> None:
        for call in self.calls:
            call.is_done = True


class Run:
    """A run with the given checkpoints, each whole, that goes on from `first`."""

    def __init__(self, folder: Path, steps: list[int], first: int | None, keep: int) -> None:
        self.dir, self.host, self.events = str(folder), ActorHost(), []
        for step in steps:
            part = write_part(self.url(step), "sequence_0.safetensors", {"param/a": torch.full((3,), float(step))})
            write_manifest(self.url(step), step, [part], {"workers": 1})
        recovery = SimpleNamespace(keep=keep, checkpoint_every=2, hang_timeout_s=1.0)
        config = SimpleNamespace(run=SimpleNamespace(dir=self.dir, timeout_s=1.0), recovery=recovery)
        assigner = SimpleNamespace(config=config, plan=SimpleNamespace(levels=()), hosts=FakeHosts(self.host))
        self.first = None if first is None else self.url(first)
        self.make = lambda: Checkpoints(assigner, self.first, lambda: None, self.events.append)
        self.checkpoints = self.make()

    def url(self, step: int) -> str:
        return checkpoint_dir(self.dir, step)

    def begin(self, step: int) -> None:
        self.checkpoints.begin(Point(attempt=1, step=step, sizes={SEQUENCE: 1}, holders={WORKER: ["a"]}, shared=[(WORKER, "a")]))

    def write(self, *steps: int) -> None:
        for step in steps:
            self.begin(step)
            self.checkpoints.advance()

    def damage(self, step: int) -> None:
        part = Path(self.url(step)) / "sequence_0.safetensors"
        data = bytearray(part.read_bytes())
        data[-1] ^= 1
        part.write_bytes(data)

    @property
    def names(self) -> list[str]:
        return sorted(p.name.removeprefix("step_0000000") for p in (Path(self.dir) / "checkpoints").iterdir())


def test_what_a_resume_passed_over_is_put_aside_and_never_counts(tmp_path):
    run = Run(tmp_path, [10, 20], first=10, keep=1)
    run.damage(20)
    run.checkpoints.start()
    assert run.names == ["10", "20.aside"]
    assert run.events == ["put aside step_000000020 as step_000000020.aside: it is not what the run continues from"]
    assert run.checkpoints.stored() == (10, run.url(10))
    run.write(12)
    assert run.names == ["10", "12", "20.aside"] and read_manifest(run.url(12)).step == 12
    run.write(14, 16)
    assert run.names == ["10", "16", "20.aside"]
    run.write(18, 20, 22)
    assert run.names == ["10", "20.aside", "22"]


def test_a_resume_from_a_chosen_step_puts_every_later_checkpoint_aside(tmp_path):
    run = Run(tmp_path, [10, 20, 30], first=10, keep=2)
    run.checkpoints.start()
    run.write(12, 14)
    assert run.names == ["10", "12", "14", "20.aside", "30.aside"]
    # A conductor that is started again, with the arguments of the first one.
    again = run.make()
    assert again.stored() == (14, run.url(14)) and (again.newest, again.written_step) == (run.url(14), 14)
    assert again.digest == read_manifest(run.url(14)).digest
    assert run.names == ["10", "12", "14", "20.aside", "30.aside"]


def test_a_fresh_run_puts_aside_what_is_named_as_its_checkpoints(tmp_path):
    run = Run(tmp_path, [2], first=None, keep=1)
    (tmp_path / "checkpoints" / "step_000000004").write_text("a file")
    run.checkpoints.start()
    assert run.checkpoints.stored() is None
    run.write(2, 4)
    assert run.names == ["02.aside", "04", "04.aside"]


def test_an_older_damaged_checkpoint_does_not_take_the_place_of_a_good_one(tmp_path):
    run = Run(tmp_path, [10, 20, 30], first=30, keep=3)
    run.damage(20)
    run.checkpoints.start()
    run.write(40)
    assert run.names == ["10", "20.aside", "30", "40"]
    assert any("step_000000020: corrupted checkpoint: sequence_0.safetensors" in e and "put aside" in e for e in run.events)


def test_a_checkpoint_that_is_damaged_while_the_run_goes_on_is_put_aside_and_written_again(tmp_path):
    run = Run(tmp_path, [], first=None, keep=2)
    run.write(2, 4)
    run.damage(4)
    assert run.checkpoints.stored() == (2, run.url(2)) and run.names == ["02", "04.aside"]
    assert (run.checkpoints.newest, run.checkpoints.written_step) == (run.url(2), 2)
    run.write(4)
    assert run.names == ["02", "04", "04.aside"] and read_manifest(run.url(4)).step == 4


def test_where_none_can_be_read_none_is_put_aside_and_all_are_written_again(tmp_path):
    run = Run(tmp_path, [], first=None, keep=2)
    run.write(2, 4)
    run.damage(2)
    run.damage(4)
    assert run.checkpoints.stored() is None
    assert any("no usable checkpoint" in e and "step_000000002" in e and "step_000000004" in e for e in run.events)
    run.write(2)
    assert run.names == ["02", "04"] and run.checkpoints.newest == run.url(2)
    run.write(4)
    assert run.names == ["02", "04"] and run.checkpoints.stored() == (4, run.url(4))


def test_a_storage_that_fails_for_a_moment_costs_no_checkpoint(tmp_path, monkeypatch):
    run = Run(tmp_path, [], first=None, keep=2)
    run.write(2, 4)
    with monkeypatch.context() as failing:
        failing.setattr("nlray.checkpoint._verify_file", lambda *_: (_ for _ in ()).throw(OSError(110, "Connection timed out")))
        assert run.checkpoints.stored() is None
    assert run.names == ["02", "04"] and run.checkpoints.stored() == (4, run.url(4))


def test_checkpoints_are_completed_in_the_order_of_their_steps(tmp_path):
    """A later one that is ready first would have the rotation delete the parts of an earlier one, and end as the older of the two."""
    run = Run(tmp_path, [], first=None, keep=1)
    run.host.slow_steps = {2}
    run.begin(2)
    run.write(4)
    assert run.checkpoints.newest is None
    run.host.finish()
    run.checkpoints.advance()
    assert run.checkpoints.newest == run.url(4) and run.names == ["04"]


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_the_run(tmp_path, monkeypatch):
    run = Run(tmp_path, [], first=None, keep=1)
    run.write(2)

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("nlray.rotation._delete", refused)
    run.write(4)
    assert run.checkpoints.newest == run.url(4)
    assert "an old checkpoint could not be deleted: Permission denied" in run.events


def test_a_checkpoint_whose_storage_fails_for_a_while_is_written_again_and_older_ones_give_way(tmp_path, monkeypatch):
    run = Run(tmp_path, [], first=None, keep=2)
    monkeypatch.setattr(checkpoints, "RETRY_S", 0.0)
    run.write(2)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as away:
        away.setattr(checkpoints, "write_manifest", full)
        run.write(4)
        assert run.checkpoints.steps_under_way == (4,) and run.checkpoints.newest == run.url(2)
        run.write(6)
        assert run.checkpoints.steps_under_way == (6,) and run.names == ["02", "06"]
    run.checkpoints.advance()
    assert run.checkpoints.steps_under_way == () and run.names == ["02", "06"] and read_manifest(run.url(6)).step == 6
    told = [event for event in run.events if event.startswith("checkpoints in ")]
    assert len(told) == 2 and "cannot be written: No space left on device" in told[0] and "can be written again" in told[1]
    assert "step 4: no checkpoint; that of step 6 takes its place" in run.events


def test_a_checkpoint_that_will_never_be_written_ends_the_run_at_once(tmp_path, monkeypatch):
    run = Run(tmp_path, [], first=None, keep=2)

    def refused(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(checkpoints, "write_manifest", refused)
    with pytest.raises(RunFailedError, match="step_000000002 cannot be written: Read-only file system"):
        run.write(2)
