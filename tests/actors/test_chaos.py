"""The fault injector: what it does next, which recovery answers which fault, the goodput, and a real run under faults."""

import random
from dataclasses import replace

import pytest

from nlray.actors import chaos
from nlray.actors.chaos import (
    GoodputReport,
    Injection,
    Injector,
    Target,
    choose,
    goodput_report,
    match,
    pause_s,
    targets_of,
    useful_seconds,
)
from nlray.actors.types import ActorStatus, RunDescription, RunStatus
from nlray.clusters.chaos import parse_kinds, report_lines
from nlray.errors import UserError

from .conftest import run_to_end

HOSTS = (
    ActorStatus(role="sequence-0", actor="sequence-0.1", pid=10, node="head", is_ready=True),
    ActorStatus(role="sequence-1", actor="sequence-1.2", pid=11, node="west", is_ready=True),
    ActorStatus(role="my-level-0", actor="my-level-0.3", pid=12, node="west", is_ready=True),
    ActorStatus(role="slow-0", actor="slow-0.4", pid=0, node="", is_ready=False),
    ActorStatus(role="standby", actor="standby-0.5", pid=14, node="east", is_ready=True),
)
RUN = RunDescription(
    name="run",
    dir="dir",
    state="running",
    step=7,
    steps=100,
    point=0,
    sizes={"sequence": 2, "my-level": 1, "slow": 1},
    wanted={},
    actors=HOSTS,
    recoveries=(),
    row=None,
    pid=9,
    node="east",
)


def recovery(at: float, *roles: str, restore_s: float = 3.0, replay_s: float | None = 1.0) -> dict:
    return {"at": at, "roles": list(roles), "kinds": ["died"], "restore_s": restore_s, "replay_s": replay_s}


def injection(at: float, *roles: str, kind: str = "worker") -> Injection:
    return Injection(at=at, target=Target(kind=kind, roles=roles, pid=1, node="head"))


def test_targets_are_the_hosted_roles_of_a_kind():
    found = {kind: [t.roles for t in targets_of(kind, RUN, {"west"})] for kind in chaos.KINDS}
    assert found == {
        "worker": [("sequence-0",), ("sequence-1",)],
        "rank": [("my-level-0",)],
        "hang": [("sequence-0",), ("sequence-1",), ("my-level-0",)],
        "conductor": [("conductor",)],
        "node": [("sequence-1", "my-level-0")],
    }
    assert targets_of("node", RUN, {"west", "east", "empty"})[0] == Target(kind="node", roles=("conductor",), pid=0, node="east")
    assert targets_of("node", RUN, ()) == []


def test_the_seed_decides_and_every_kind_comes():
    def drawn(seed: int) -> list[tuple]:
        generator = random.Random(seed)
        return [(choose(generator, ("worker", "rank", "node"), RUN, ()), pause_s(generator, 10)) for _ in range(40)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert {target.kind for target, _ in drawn(1)} == {"worker", "rank"}
    assert all(8 <= pause <= 12 for _, pause in drawn(1))
    assert choose(random.Random(0), ("rank",), replace(RUN, actors=()), ()) is None


def test_a_fault_is_answered_by_the_recovery_that_names_it():
    first, second = injection(10, "sequence-0"), injection(30, "my-level-0")
    recoveries = [recovery(10.5, "sequence-0"), recovery(30.2, "my-level-0", "sequence-1")]
    outcomes = match([first, second], recoveries)
    assert [o.recovery["at"] for o in outcomes] == [10.5, 30.2]
    assert [round(o.detection_s, 3) for o in outcomes] == [0.5, 0.2]


def test_one_recovery_answers_faults_that_came_together_and_a_later_one_none():
    hung, killed = injection(10, "sequence-0", kind="hang"), injection(12, "my-level-0")
    together = recovery(12.5, "my-level-0", "sequence-0")
    assert [o.recovery for o in match([hung, killed], [together])] == [together, together]
    # Done while a recovery was under way, which then names both.
    under_way = recovery(9.0, "slow-0", "sequence-0")
    assert match([hung], [under_way])[0].detection_s == 0
    assert match([hung], [recovery(1.0, "sequence-0")])[0].recovery is None


def test_without_a_name_the_next_recovery_answers_not_that_of_a_later_hit():
    first, again = injection(10, "sequence-0"), injection(50, "sequence-0")
    unnamed, named = recovery(11.0, "the start"), recovery(51.0, "sequence-0")
    assert [o.recovery for o in match([first, again], [unnamed, named])] == [unnamed, named]


def test_goodput_counts_each_step_once_and_medians_are_by_kind():
    rows = [{"step": s, "tokens": 100 * s, "tokens_per_second": 50.0} for s in (3, 4, 5)]
    assert useful_seconds(rows) == 6.0
    injections = [injection(10, "sequence-0"), injection(30, "sequence-1"), injection(60, "conductor", kind="conductor")]
    recoveries = [recovery(11, "sequence-0", restore_s=2.0), recovery(33, "sequence-1", restore_s=4.0, replay_s=None)]
    report = goodput_report(injections, recoveries, wall_seconds=60.0, num_steps=3, step_seconds=6.0)
    assert report.goodput == pytest.approx(0.1) and report.useful_steps == 3
    worker, conductor = report.kinds["worker"], report.kinds["conductor"]
    assert (worker.faults, worker.recovered, worker.detection_s, worker.restore_s, worker.replay_s) == (2, 2, 2.0, 3.0, 1.0)
    assert (conductor.faults, conductor.recovered, conductor.detection_s) == (1, 0, None)
    assert "goodput 10.0 %" in report_lines(report)[0]
    assert report_lines(GoodputReport(wall_seconds=0.0, useful_steps=0, useful_seconds=0.0, goodput=None, recoveries=0, kinds={}))[
        0
    ].endswith("goodput -")


def test_kinds_that_there_are_not_are_the_users_mistake():
    assert parse_kinds("worker, hang") == ["worker", "hang"]
    for text in ("", "worker,gremlin"):
        with pytest.raises(UserError, match="allowed: a list of worker, rank, node, conductor, hang"):
            parse_kinds(text)


class FakeClient:
    """A run whose state a test sets."""

    timeout_s = 5.0

    def __init__(self) -> None:
        self.run, self.summary = RUN, None

    def describe(self) -> RunDescription:
        return self.run

    def poll(self, rows_after: int, events_from: int) -> RunStatus:
        return RunStatus(state=self.run.state, rows=[], events=[], summary=self.summary)


def test_no_fault_is_done_while_the_run_recovers_nor_after_the_last(monkeypatch):
    done: list[Target] = []
    monkeypatch.setattr(chaos, "carry_out", lambda target: done.append(target) or True)
    client, lines = FakeClient(), []
    injector = Injector(client, kinds=("worker",), every_s=0.0, seed=0, say=lines.append, max_faults=2)
    assert injector.tick() and len(done) == 1
    client.run = replace(RUN, state="recovering")
    assert injector.tick() and injector.tick() and len(done) == 1
    assert lines[1:] == ["the run is recovering: waiting with the next fault"]
    client.run = RUN
    assert injector.tick() and len(done) == 2
    answer = recovery(injector.injections[0].at, *done[0].roles, *done[1].roles)
    client.run = replace(RUN, recoveries=({**answer, "replay_s": None},))
    assert injector.tick()
    client.run = replace(RUN, recoveries=(answer,))
    assert not injector.tick() and len(done) == 2
    assert injector.report().kinds["worker"].recovered == 2


def test_kinds_that_do_not_apply_are_left_out_and_none_left_is_the_users_mistake(monkeypatch):
    monkeypatch.setattr(chaos, "removable_nodes", set)
    client, lines = FakeClient(), []
    client.run = replace(RUN, sizes={"sequence": 2})
    injector = Injector(client, kinds=("node", "rank", "worker"), every_s=1, seed=0, say=lines.append)
    assert injector.kinds == ["worker"] and [line.split(":")[0] for line in lines] == ["rank", "node"]
    with pytest.raises(UserError, match="--kinds node,rank: none of these applies to run run"):
        Injector(client, kinds=("node", "rank"), every_s=1, seed=0, say=lines.append)


@pytest.mark.chaos
def test_a_run_under_random_faults_ends_with_the_bits_of_a_quiet_one(small, cluster):
    settings = ["run.steps=250", "sequence.workers=2", "recovery.window=20", "recovery.hang_timeout_s=3", "eval.sequences=0"]
    quiet, _, _ = run_to_end(small(*settings))
    injectors: list[Injector] = []

    def during(handle, rows):
        if not injectors:
            injectors.append(Injector(handle.client, kinds=("worker", "rank", "conductor"), every_s=1.0, seed=4, say=print, max_faults=3))
        injectors[0].tick()

    status, rows, events = run_to_end(small(*settings, name="chaos"), during=during, limit_s=400)
    injectors[0].tick()
    report = injectors[0].report()
    assert status.state == "completed", (status.message, events)
    assert len(injectors[0].injections) == 3, events
    assert sum(found.recovered for found in report.kinds.values()) == 3, (report, status.summary["recovery_log"])
    assert 0 < report.goodput < 1
    assert [row["step"] for row in rows] == list(range(1, 251))
    assert status.summary["digest"] == quiet.summary["digest"]
