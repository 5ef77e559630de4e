"""Runs over several nodes: copies lie on another node, a node goes, a node joins."""

import socket
import time
from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster

from nlray.actors.hosts.nodes import Nodes
from nlray.actors.hosts.processes import kill_node
from nlray.actors.preparation import resume_config

from .conftest import run_to_end
from .plain_loop import digest_plainly, train_plainly


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A head without CPUs and three nodes; the one with `rare` is the only one of its kind."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for resources in ({"rare": 1}, {"spot": 4}, {"spot": 4}):
        cluster.add_node(num_cpus=3, resources=resources)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_a_node_is_lost_when_nothing_listens_at_its_raylets_port(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as raylet:
        port = raylet.getsockname()[1]
        known = [{"NodeID": "there", "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port}]
        monkeypatch.setattr(ray, "nodes", lambda: known)
        found = Nodes()
        assert not found.is_lost("there") and not found.is_lost("never heard of") and found.lost == set()
    assert not found.is_lost("there"), "it was looked at a moment ago"
    assert found.is_lost("there", is_silence_loss=True)
    known.clear()
    assert found.is_lost("there") and found.lost == {"there"}


def test_a_silent_machine_is_lost_only_where_silence_counts(monkeypatch):
    def no_answer(*_: object, **__: object) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "far", "NodeManagerAddress": "192.0.2.1", "NodeManagerPort": 1}])
    monkeypatch.setattr(socket, "create_connection", no_answer)
    found = Nodes()
    assert not found.is_lost("far") and found.lost == set()
    assert found.is_lost("far", is_silence_loss=True) and found.lost == {"far"}


def node_of(handle, role: str) -> str:
    return next(host.node for host in handle.client.describe().actors if host.role == role)


@pytest.mark.slow
def test_a_lost_node_changes_no_bit_and_one_that_joins_is_used(small, nodes):
    spot = "cms.levels.medium.resources={cpus: 0.1, gpus: 0, custom: {spot: 1}}"
    overrides = ["run.steps=240", "recovery.window=20", "recovery.hang_timeout_s=10", "eval.every=0", spot]
    config = small(*overrides)
    lost, joined = [], []

    def during(handle, rows):
        if not lost and rows and rows[-1]["step"] >= 50:
            lost.append(node_of(handle, "medium-0"))
            kill_node(lost[0], timeout_s=20)
        if not joined and rows and rows[-1]["step"] >= 120 and handle.client.describe().recoveries:
            nodes.add_node(num_cpus=3, resources={"spot": 4})
            joined.append(True)

    status, _, events = run_to_end(config, during=during)
    assert status.state == "completed" and lost and joined, (status.message, events)
    (recovery,) = status.summary["recovery_log"]
    assert recovery["source"] == "memory" and f"was lost with its node {lost[0][:8]}" in recovery["message"], recovery
    assert set(recovery["kinds"]) == {"died"} and "medium-0" in recovery["roles"], recovery
    assert status.summary["digest"] == digest_plainly(train_plainly(config, 240)[0])


@pytest.mark.chaos
def test_a_run_on_one_node_keeps_its_copies_on_another_and_outlives_its_own(small, nodes):
    pair = "resources={cpus: 0.1, gpus: 0, threads: 1, custom: {pair: 1}}"
    levels = [f"cms.levels.{name}.{pair}" for name in ("fast", "medium", "slow")]
    config = small("run.steps=4000", "recovery.window=20", "eval.every=0", f"sequence.{pair}", *levels, name="pair")
    nodes.add_node(num_cpus=3, resources={"pair": 4})
    lost, stopped = [], []

    def during(handle, rows):
        run = handle.client.describe()
        backups = [m for m in run.actors if m.role == "backup" and m.is_ready]
        if not lost and backups and run.point is not None and run.point >= 40:
            lost.append(node_of(handle, "sequence-0"))
            assert {m.node for m in run.actors if m.role != "backup"} == set(lost) and backups[0].node != lost[0]
            nodes.add_node(num_cpus=3, resources={"pair": 4})
            kill_node(lost[0], timeout_s=20)
        if not stopped and run.recoveries and run.recoveries[-1]["replay_s"] is not None:
            stopped.append(handle.request_stop())

    status, _, events = run_to_end(config, during=during)
    assert status.state == "stopped" and lost, (status.message, events)
    assert any("all actors are on one node: backup-0." in event for event in events), events
    (recovery,) = status.summary["recovery_log"]
    assert recovery["source"] == "memory" and recovery["restored"] >= 40, recovery
    assert sorted(recovery["roles"]) == ["fast-0", "medium-0", "sequence-0", "slow-0"]
    assert status.summary["digest"] == digest_plainly(train_plainly(config, status.summary["steps"])[0])


@pytest.mark.chaos
def test_growing_waits_for_a_node_while_the_run_goes_on(small, nodes):
    rare = "cms.levels.slow.resources={cpus: 0.1, gpus: 0, custom: {rare: 1}}"
    config = small("run.steps=800", "recovery.window=50", "eval.every=0", rare, name="grow")
    asked, joined = [], []

    def during(handle, rows):
        if not asked and rows and rows[-1]["step"] >= 50:
            handle.client.request_scale({"slow": 2})
            asked.append(rows[-1]["step"])
        run = handle.client.describe()
        if not joined and asked and any("waits for resources" in event for event in handle.client.poll(10**9, 0).events):
            joined.append(run.step)
            assert run.wanted == {"slow": 2} and run.sizes["slow"] == 1
            nodes.add_node(num_cpus=1, resources={"rare": 1})

    status, _, events = run_to_end(config, during=during)
    assert status.state == "completed" and joined, (status.message, events)
    assert joined[0] > asked[0] + 5  # it did not stop to wait
    assert any(event.startswith("slow-1.") and "waits for resources: 0.1 CPU, 1 rare on one node" in event for event in events), events
    assert status.summary["levels"][2]["ranks"] == 2 and status.summary["recoveries"] == 0
    assert status.summary["digest"] == digest_plainly(train_plainly(config, 800)[0])


@pytest.mark.chaos
def test_a_run_that_has_no_node_for_a_lost_rank_waits_and_can_be_stopped_and_resumed(small, nodes):
    mine = "cms.levels.slow.resources={cpus: 0.1, gpus: 0, custom: {mine: 1}}"
    config = small("run.steps=300", "recovery.window=10", "run.timeout_s=15", "eval.every=0", mine, name="waits")
    nodes.add_node(num_cpus=1, resources={"mine": 1})
    lost, asked = [], []

    def during(handle, rows):
        if not lost and rows and rows[-1]["step"] >= 50:
            lost.append(time.monotonic())
            kill_node(node_of(handle, "slow-0"), timeout_s=20)
        # Longer than any other wait may take.
        if lost and not asked and time.monotonic() - lost[0] > 20:
            asked.append(handle.request_stop())

    status, rows, events = run_to_end(config, during=during)
    assert status.state == "stopped" and asked, (status.message, events)
    assert any(event.startswith("slow-0 waits for resources: 0.1 CPU, 1 mine on one node") for event in events), events
    assert events[-2] == "the run was stopped while it waited for resources", events
    stopped_at = status.summary["steps"]
    assert 30 <= stopped_at <= rows[-1]["step"] and stopped_at % 10 == 0
    nodes.add_node(num_cpus=1, resources={"mine": 1})
    resumed, _, _ = run_to_end(resume_config(config.run.dir, []), resume=True)
    assert resumed.state == "completed"
    assert resumed.summary["digest"] == digest_plainly(train_plainly(config, 300)[0])
