"""A run that cannot go on ends with a clear line, a usable checkpoint, and no actor left behind."""

import math
import os

import pytest
import ray
import torch

from nlray.actors.control.conductor import namespace_of
from nlray.actors.hosts.host import Behaviours
from nlray.actors.launch import launch, leave_deaths_to_the_run
from nlray.actors.preparation import resume_config
from nlray.actors.ranks.rank import LevelRank
from nlray.checkpoint import load_parameters
from nlray.config import Config
from nlray.errors import NonFiniteLossError, UserError
from nlray.models.state import state_tensors

from .conftest import run_to_end
from .in_process import InProcessRun
from .plain_loop import digest_plainly, train_plainly


class BrokenRank(LevelRank):
    """Fails in its third update."""

    def _apply(self, contributions):
        if contributions[0].version == 3 and self.role.index == 1:
            raise ArithmeticError("broken on purpose")
        super()._apply(contributions)


def test_steps_with_a_loss_that_is_not_finite_are_skipped_in_every_worker_and_level(small):
    config = small("run.steps=12", "cms.levels.slow=null")
    run = InProcessRun(config)
    honest, calls = run.worker.replica.model.token_losses, 0

    def losses(blocks, state=None):
        nonlocal calls
        calls += 1
        found, after = honest(blocks, state)
        return (found * math.nan if calls in (3, 5, 6, 7, 8) else found), after

    run.worker.replica.model.token_losses = losses
    run.train()
    rows = run.worker.report(0).rows
    assert [r["step"] for r in rows if r["loss"] is None] == [3, 5, 6, 7, 8]
    assert rows[-1]["skipped"] == 5
    assert all(torch.isfinite(p).all() for p in run.parameters.values())
    # Steps 5 to 8 are a whole period of `medium`: its version counts on, its optimizer does not.
    medium = run.ranks["medium"][0]
    assert medium.version == 3
    assert {int(v) for k, v in medium.learner.optimizer.state_tensors().items() if k.endswith("/step")} == {2}
    assert {int(v) for k, v in run.worker.optimizer.state_tensors().items() if k.endswith("/step")} == {7}


def test_a_skipped_step_leaves_the_carried_state_as_it_was(small):
    run = InProcessRun(small("model.titans.carry_state=true", "run.steps=5", "eval.sequences=0"))
    honest, seen = run.worker.replica.model.token_losses, []

    def losses(blocks, state=None):
        seen.append({} if state is None else {name: tensor.clone() for name, tensor in state_tensors(state).items()})
        found, after = honest(blocks, state)
        return (found * math.nan, after) if len(seen) == 3 else (found, after)

    run.worker.replica.model.token_losses = losses
    run.train()
    assert seen[0] == {} and all(torch.isfinite(t).all() for t in run.worker.replica.lanes.tensors().values())
    # Steps 3 and 4 start from what step 2 left, step 5 from what step 4 did.
    assert all(torch.equal(seen[2][n], seen[3][n]) and not torch.equal(seen[3][n], seen[4][n]) for n in seen[2] if "fast_weights" in n)


def test_ten_such_steps_in_a_row_end_the_run(small):
    run = InProcessRun(small())
    honest = run.worker.replica.model.token_losses
    run.worker.replica.model.token_losses = lambda blocks, state: (honest(blocks, state)[0] * math.inf, None)
    with pytest.raises(NonFiniteLossError, match="10 steps in a row, last in step 10"):
        run.train()


def test_a_diverged_run_fails_with_the_last_good_checkpoint(small, cluster):
    # Each step multiplies the matrices by a million.
    diverging = ["sequence.optimizer.lr=1000", "sequence.optimizer.weight_decay=1000", "sequence.optimizer.schedule.warmup=0"]
    config = small("recovery.checkpoint_every=2", "cms.levels.medium=null", "cms.levels.slow=null", "run.steps=60", *diverging)
    status, _, events = run_to_end(config)
    assert status.state == "failed" and status.exit_code == 1
    assert "not finite for 10 steps in a row" in status.message
    assert any("the step is skipped" in e for e in events)
    assert status.summary["skipped_steps"] == 10 and status.summary["digest"] is None
    assert load_parameters(status.summary["checkpoint"])


@pytest.mark.slow
def test_a_fault_that_comes_again_at_the_same_step_ends_the_run_with_a_usable_checkpoint(small, cluster):
    levels = ["cms.levels.fast.ranks=2", "cms.levels.medium=null"]
    config = small(*levels, "run.steps=60", "recovery.window=2")
    status, _, _ = run_to_end(config, behaviours=Behaviours(level_rank=BrokenRank))
    assert (status.state, status.exit_code) == ("failed", 1)
    assert status.message == "level fast rank 1: ArithmeticError: broken on purpose; 3 times at step 3, given up"
    assert status.summary["recoveries"] == 2 and status.summary["checkpoint"].endswith("step_000000002")
    resumed, _, _ = run_to_end(resume_config(config.run.dir, ["run.steps=8"]), resume=True)
    assert resumed.state == "completed"
    assert resumed.summary["digest"] == digest_plainly(train_plainly(small(*levels, "run.steps=8"), 8)[0])


def test_stop_ends_the_run_with_a_checkpoint(small, cluster):
    config = small("cms.levels.medium=null", "cms.levels.slow=null", "run.steps=100000")
    status, rows, _ = run_to_end(config, during=lambda handle, rows: handle.request_stop() if rows else None)
    assert status.state == "stopped" and status.exit_code == 0
    assert status.summary["checkpoint"].endswith(f"step_{rows[-1]['step']:09d}")
    assert load_parameters(status.summary["checkpoint"])


def test_more_gpus_than_there_are_is_the_users_mistake(small, cluster, tmp_path):
    with pytest.raises(UserError, match=r"sequence\.resources asks for 9 GPU on one node; the largest node of the cluster has 8"):
        launch(small("sequence.resources.gpus=9"))
    with pytest.raises(
        UserError, match=r"the run asks for 10 GPU \(cms\.levels\.slow\.resources, sequence\.resources\); the cluster has 8"
    ):
        launch(small("sequence.resources.gpus=4", "cms.levels.slow.resources.gpus=6"))
    with pytest.raises(UserError, match=r"cms\.levels\.slow\.resources\.labels is .*no node of the cluster carries these labels"):
        launch(small("cms.levels.slow.resources.labels={region: moon}"))
    with pytest.raises(UserError, match=r"cms\.levels\.slow\.ranks is 99; allowed: at most the level's 6 tensors"):
        launch(small("cms.levels.slow.ranks=99"))
    assert not (tmp_path / "run").exists()


def test_gpus_auto_is_one_each_where_they_go_round_and_the_workers_first_where_not(small):
    from nlray.actors.hosts.placement import plan_actors

    config = small("cms.levels.slow.ranks=2")
    assert list(config.levels) == ["fast", "medium", "slow"]
    for gpus, expected, num_notes in [(8, [1] * 5, 0), (3, [1, 0, 0, 0, 0], 1), (0, [0] * 5, 0)]:
        actors, notes = plan_actors(config, gpus)
        assert ([a.gpus for a in actors], len(notes)) == (expected, num_notes)


def test_too_little_held_out_text_is_told_before_the_first_step(small, cluster, tmp_path):
    (tmp_path / "short.txt").write_text("a text that is shorter than one sequence\n")
    status, rows, _ = run_to_end(small("model.kind=transformer", f"data.sources=[{tmp_path}/short.txt]"))
    assert (status.state, status.exit_code, rows) == ("failed", 2, [])
    assert status.message.startswith("data.eval_fraction is 0.2: the records held out do not fill one sequence of 32 tokens")


def test_ray_prints_nothing_of_actors_that_die_but_what_else_it_has_to_say(monkeypatch):
    printed = []
    monkeypatch.setattr(ray._private.worker, "print_to_stdstream", lambda data, ignore_prefix: printed.extend(data["lines"]))
    for _ in range(2):
        leave_deaths_to_the_run()
    worker = "A worker died or was killed while executing a task by an unexpected system error."
    node = "Raylet is terminated. Termination is unexpected."
    for line in worker, node, "1 Workers were killed due to memory pressure (OOM).":
        ray._private.worker.print_to_stdstream({"lines": [line], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    assert printed == ["1 Workers were killed due to memory pressure (OOM)."]


def test_kernels_are_insisted_on_only_with_gpus_and_a_resume_may_change_them(small):
    from nlray.actors.hosts.placement import check_kernels, plan_actors
    from nlray.actors.preparation import fixed_on_resume

    config = small("model.titans.kernels=triton")
    check_kernels(config, plan_actors(config, 1)[0])
    with pytest.raises(UserError, match=r"model.titans.kernels is triton and a sequence worker has no GPU .*; allowed then: auto, torch"):
        check_kernels(config, plan_actors(config, 0)[0])
    check_kernels(small(), plan_actors(small(), 0)[0])
    assert fixed_on_resume(config) == fixed_on_resume(small())
    config = small("cms.levels.fast.optimizer.kernels=triton")
    check_kernels(config, plan_actors(config, 8)[0])
    with pytest.raises(UserError, match=r"cms.levels.fast.optimizer.kernels is triton and a rank of level fast has no GPU .*auto, torch"):
        check_kernels(config, plan_actors(config, 1)[0])
    assert fixed_on_resume(config) == fixed_on_resume(small())
    # In the nested variant a level's ranks step its initial state by the next slower level's optimizer.
    own = ["cms.levels.medium.optimizer.kernels=triton", "cms.levels.fast.resources.gpus=0"]
    check_kernels(config := small(*own), plan_actors(config, 8)[0])
    with pytest.raises(UserError, match=r"cms.levels.medium.optimizer.kernels is triton and a rank of level fast has no GPU"):
        check_kernels(config := small("cms.variant=nested", *own), plan_actors(config, 8)[0])


def test_the_fit_is_checked_per_node_and_per_label(small):
    from nlray.actors.hosts.placement import check_fit, plan_actors

    def node(labels=None, **resources):
        return {"Alive": True, "Resources": resources, "Labels": labels or {}}

    config = small("cms.levels.slow.resources={cpus: 1, labels: {region: west}}", "cms.levels.fast.resources.custom={far: 1}")
    actors, _ = plan_actors(config, 0)
    check_fit(actors, [node(CPU=2, far=1), node({"region": "west"}, CPU=1)])
    with pytest.raises(UserError, match=r"cms.levels.fast.resources asks for 1 far on one node; the largest node of the cluster has 0"):
        check_fit(actors, [node(CPU=2), node({"region": "west"}, CPU=1)])
    with pytest.raises(UserError, match=r"cms.levels.slow.resources asks for 1 CPU on one node; the largest .* has 0.5"):
        check_fit(actors, [node(CPU=2, far=1), node({"region": "west"}, CPU=0.5)])
    dead = {**node(CPU=9), "Alive": False}
    with pytest.raises(UserError, match=r"the run asks for 2.2 CPU \(.*\); the cluster has 2"):
        check_fit(actors, [node(CPU=1, far=1), node({"region": "west"}, CPU=1), dead])


def pid_of(config: Config, name: str) -> int:
    return ray.get(ray.get_actor(name, namespace_of(config.run.name)).__ray_call__.remote(lambda self: os.getpid()), timeout=20)
