"""The states of a run, one step at a time, with hosts of the test's own: no Ray, no tensors."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from nlray.actors.control import states
from nlray.actors.control.run_lock import Owner
from nlray.actors.control.states import Closing, Ended
from nlray.actors.control.supervisor import Supervisor
from nlray.actors.faults import MAX_SAME_FAULTS, Fault
from nlray.actors.hosts.placement import plan_actors
from nlray.actors.hosts.pool import CONDUCTOR
from nlray.actors.recovery.snapshots import SnapshotStore
from nlray.actors.types import Role
from nlray.checkpoint import read_manifest
from nlray.config import Config
from nlray.errors import RemoteTimeoutError, UserError
from nlray.metrics import read_events, read_json
from nlray.run_plan import RunPlan
from tests.actors.fake_hosts import Failure, FakeHosts, World

WORKER, RANK = Role("sequence", 0), Role("medium", 0)
MAX_STEPS = 200
LOCK: Any = SimpleNamespace(check=lambda: None, close=lambda: None)


class Run:
    """A supervised run; `seen` are the names of its states, each once where it stays."""

    def __init__(self, config: Config, world: World | None = None) -> None:
        self.config, self.world = config, world or World()
        self.hosts = FakeHosts(self.world)
        self.supervisor = Supervisor(
            RunPlan.build(config),
            plan_actors(config, 0)[0],
            self.hosts,
            SnapshotStore(CONDUCTOR, 5.0),
            owner=Owner(run="test"),
            checkpoint=None,
            notes=["a note of the launch"],
            address="nowhere",
        )
        self.supervisor.open(LOCK)
        self.seen = [type(self.supervisor.state).__name__]

    def step(self) -> None:
        self.supervisor.step()
        name = type(self.supervisor.state).__name__
        if name != self.seen[-1]:
            self.seen.append(name)

    def until(self, is_there: Callable[[], bool]) -> "Run":
        for _ in range(MAX_STEPS):
            if is_there():
                return self
            self.step()
        raise AssertionError(f"not there after {MAX_STEPS} steps: {self.seen}")

    def at(self, step: int) -> "Run":
        return self.until(lambda: self.supervisor.monitor.step >= step)

    def to_its_end(self) -> "Run":
        return self.until(lambda: isinstance(self.supervisor.state, Ended))

    def kill(self, role: Role) -> None:
        self.hosts.living[self.hosts.of_role(role).name].is_dead = True

    @property
    def log(self) -> list[tuple]:
        return [(r.kinds, r.roles, r.source) for r in self.supervisor.recoveries.log]

    @property
    def status(self) -> str:
        return self.supervisor.state.status

    @property
    def events(self) -> list[str]:
        return [event["text"] for event in read_events(self.config.run.dir)]


@pytest.fixture
def run(small, monkeypatch) -> Callable[..., Run]:
    monkeypatch.setattr(states, "SYMPTOM_S", 0.0)

    def make(*overrides: str, **options: Any) -> Run:
        config = small("cms.levels={medium: {update_period: 4}, fast: null, slow: null, slowest: null}", "run.steps=12", *overrides)
        return Run(config, **options)

    return make


def test_a_run_goes_from_its_first_start_to_its_summary(run):
    found = run().to_its_end()
    assert found.seen == ["Starting", "Beginning", "Running", "Finishing", "Closing", "Ended"]
    summary = read_json(f"{found.config.run.dir}/summary.json")
    assert (summary["status"], summary["steps"], summary["recoveries"]) == ("completed", 12, 0)
    assert read_manifest(summary["checkpoint"]).step == 12 and found.supervisor.assigner.last_attempt == 1
    assert not found.hosts.living and "a note of the launch" in found.events
    assert found.supervisor.status(0, 0).summary == summary


def test_a_lost_rank_takes_the_run_back_to_its_last_recovery_point(run):
    found = run().at(5)
    found.kill(RANK)
    found.to_its_end()
    assert found.seen[2:7] == ["Running", "Recovering", "Beginning", "Running", "Finishing"]
    assert found.log == [(("died",), ("medium-0",), "memory")]
    (recovery,) = found.supervisor.recoveries.log
    assert 4 <= recovery.restored <= 6 and recovery.replay_s is not None
    assert found.status == "completed" and found.supervisor.assigner.last_attempt == 2


def test_a_further_loss_while_the_roles_begin_is_part_of_the_same_recovery(run):
    found = run("sequence.workers=3", "sequence.global_batch=6").at(5)
    found.kill(RANK)
    found.world.failures = [Failure(Role("sequence", 1), "join")]
    found.to_its_end()
    assert found.log == [(("died", "died"), ("medium-0", "sequence-1"), "memory")]
    assert found.supervisor.assigner.last_attempt == 3 and found.status == "completed"


def test_an_error_is_explained_by_a_death_that_is_seen_a_moment_later(run):
    found = run().at(5)
    raised = Fault(kind="raised", role=WORKER, host=found.hosts.of_role(WORKER).name, step=5, message="its peer is gone")
    found.kill(RANK)
    found.supervisor.state = states.Recovering([raised])
    found.to_its_end()
    assert found.log == [(("died",), ("medium-0",), "memory")]


def test_a_fault_that_comes_again_and_again_ends_the_run_with_its_point_on_storage(run):
    found = run()
    found.at(5)
    for _ in range(MAX_SAME_FAULTS):
        found.world.failures.append(Failure(RANK, "start", ArithmeticError("broken")))
    found.kill(WORKER)
    found.to_its_end()
    failure = found.supervisor.status(0, 0).message
    assert found.status == "failed" and failure.startswith(f"broken; {MAX_SAME_FAULTS} times at step ") and failure.endswith("given up")
    summary = read_json(f"{found.config.run.dir}/summary.json")
    assert summary["error"] == failure and read_manifest(summary["checkpoint"]).step >= 4 and not found.hosts.living


def test_a_fault_that_a_call_meets_has_the_role_that_raised(run):
    found = run("cms.levels.medium.ranks=1").at(3)
    found.supervisor.request_scale({"medium": 2})
    found.world.failures = [Failure(Role("medium", 1), "become", ArithmeticError("broken"))]
    found.until(lambda: found.log != [])
    assert found.log == [(("raised",), ("medium-1",), "memory")] and found.supervisor.assigner.sizes["medium"] == 2
    assert found.to_its_end().status == "completed"


def test_a_rank_that_dies_while_it_writes_a_checkpoint_is_replaced(run):
    found = run("recovery.checkpoint_every=4").at(3)
    before = found.hosts.of_role(RANK).name
    found.world.failures, found.world.is_storage_slow = [Failure(RANK, "write")], False
    found.to_its_end()
    (recovery,) = found.supervisor.recoveries.log
    assert (recovery.roles, recovery.message) == (("medium-0",), "medium-0 died while it wrote the checkpoint of step 4")
    assert found.status == "completed" and before not in found.supervisor.hosts.all


@pytest.mark.parametrize(("error", "code"), [(UserError("data.sources: nothing there"), 2), (RemoteTimeoutError("waited 5 s"), 1)])
def test_a_start_that_would_fail_again_ends_the_run(error, code, run):
    found = run()
    found.world.failures = [Failure(RANK, "start", error)]
    found.to_its_end()
    status = found.supervisor.status(0, 0)
    assert (status.state, status.message, status.exit_code) == ("failed", str(error), code)
    assert found.supervisor.assigner.last_attempt == 1


def test_a_stop_is_sent_once_and_ends_with_a_checkpoint(run):
    found = run().at(3)
    found.supervisor.request_stop()
    found.to_its_end()
    summary = read_json(f"{found.config.run.dir}/summary.json")
    assert summary["status"] == "stopped" and 3 < summary["steps"] < 12 and read_manifest(summary["checkpoint"]).step == summary["steps"]


def test_another_number_of_workers_begins_at_the_point_where_they_paused(run):
    found = run().at(3)
    found.supervisor.request_scale({"sequence": 2})
    found.until(lambda: found.supervisor.assigner.sizes["sequence"] == 2)
    assert found.status == "running" and found.log == []
    found.to_its_end()
    assert found.status == "completed" and any("sequence=1 -> sequence=2; the steps paused" in event for event in found.events)


def test_a_level_changes_its_ranks_while_the_workers_run(run):
    found = run().at(3)
    found.supervisor.request_scale({"medium": 2})
    found.to_its_end()
    assert "Recovering" not in found.seen and found.log == [] and found.seen.count("Beginning") == 1
    assert any("medium=1 -> medium=2" in event for event in found.events)


def test_a_conductor_that_comes_back_continues_with_the_actors_as_they_are(run):
    before = run().at(5)
    after = run(world=before.world)
    assert after.seen == ["Returning"]
    after.to_its_end()
    assert after.seen[:2] == ["Returning", "Running"] and after.supervisor.assigner.last_attempt == 1
    assert after.log == [(("conductor",), ("conductor",), "the running actors")] and after.status == "completed"


def test_a_conductor_that_comes_back_to_fewer_actors_has_all_begin_again(run):
    before = run().at(5)
    before.kill(RANK)
    after = run(world=before.world).to_its_end()
    assert after.seen[:3] == ["Returning", "Beginning", "Running"]
    assert after.log == [(("conductor", "died"), ("conductor", before.hosts.of_role(RANK).name), "memory")]


def test_a_conductor_that_comes_back_after_the_end_only_tells_it(run):
    before = run().to_its_end()
    after = run()
    assert isinstance(after.supervisor.state, Ended) and after.supervisor.status(0, 0).summary == before.supervisor.status(0, 0).summary


def test_what_cannot_be_written_at_the_end_does_not_keep_the_run_alive(run, monkeypatch):
    found = run().at(3)
    monkeypatch.setattr(found.supervisor.journal, "write_summary", lambda _: (_ for _ in ()).throw(ValueError("no room")))
    found.supervisor.state = Closing("stopped")
    found.to_its_end()
    assert not found.hosts.living and any("summary.json could not be written: no room" in event for event in found.events)
