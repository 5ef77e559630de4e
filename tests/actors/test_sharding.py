"""`sequence.shard: full`: sequence parameters and their optimizer dealt over the workers; with two of them no bit is another one."""

import math

import pytest
import torch

from nlray.actors.recovery.snapshots import Snapshot
from nlray.actors.workers.data_parallel import DataParallelGroup
from nlray.actors.workers.sharding import ShardedParameters
from nlray.actors.workers.worker import SequenceWorker
from nlray.config.loading import load_config
from nlray.models.lm import build_model, level_parameters, place_parameters, sequence_parameters
from nlray.run_plan import RunPlan

from . import in_process
from .in_process import InProcessRun
from .plain_loop import digest_plainly, train_plainly

FULL = "sequence.shard=full"
TWO = ("sequence.workers=2", "run.steps=6", "model.seq_len=16", "eval.sequences=3")
VARIED = (
    "sequence.optimizer.name=muon",
    "sequence.recompute_blocks=true",
    "sequence.precision=bf16",
    "model.tie_head=false",
    "model.titans.carry_state=true",
    "cms.variant=independent",
)


@pytest.mark.parametrize("overrides", [(), VARIED], ids=["default", "varied"])
def test_two_workers_with_shares_give_the_bits_and_losses_of_two_with_everything(small, overrides):
    whole, sharded = (InProcessRun(small(*TWO, *overrides, *extra)).train() for extra in ((), (FULL,)))
    assert digest_plainly(sharded.parameters) == digest_plainly(whole.parameters)
    losses = [[(row["loss"], row.get("eval_loss")) for row in run.worker.report(0).rows] for run in (whole, sharded)]
    assert losses[0] == losses[1] and losses[0][-1][1] is not None


def test_micro_batches_and_three_workers_agree_with_the_plain_loop_to_summation_order(small):
    sizes = ("sequence.workers=3", "sequence.global_batch=6", "sequence.micro_batch=1", "model.seq_len=16", "eval.sequences=0")
    config = small(*sizes, FULL)
    found, (plain, losses) = InProcessRun(config).train(), train_plainly(config, 20)
    assert found.parameters.keys() == plain.keys()
    for name, tensor in plain.items():
        error = torch.linalg.vector_norm(found.parameters[name] - tensor) / torch.linalg.vector_norm(tensor)
        assert error < 1e-5, f"{name}: {error:.2e}"
    assert [row["loss"] for row in found.worker.report(0).rows] == pytest.approx(losses, rel=1e-5)


def test_checkpoints_hold_whole_tensors_that_any_number_of_workers_take_up_with_or_without_shares(small, tmp_path):
    whole = InProcessRun(small(*TWO)).train()
    first = InProcessRun(small(*TWO, FULL, "run.stop_after=3")).train()
    first.write(3, str(tmp_path / "three"))
    for extra in ((FULL,), ()):
        second = InProcessRun(small(*TWO, *extra))
        second.load(str(tmp_path / "three"))
        assert digest_plainly(second.train().parameters) == digest_plainly(whole.parameters)
    # And from a point in memory, with another number of workers, whose shares are other ones.
    third = InProcessRun(small(*TWO, "sequence.workers=4", FULL))
    parts = [worker.snapshot(3) for worker in first.workers]
    tensors = {name: t for part in parts for name, t in part.tensors.items()}
    before = {n: (worker, p) for worker in first.workers for n, p in worker.replica.parameters.items()}
    for worker in third.workers:
        worker.restore(
            Snapshot(key=parts[0].key, group_size=2, tensors={n: t for n, t in tensors.items() if worker.wants(n)}, state=parts[0].state)
        )
        for name, parameter in worker.replica.parameters.items():
            owner, saved = before[name]
            assert torch.equal(parameter, saved)
            key = f"{name}/exp_avg"
            assert torch.equal(worker.optimizer.state_tensors()[key], owner.optimizer.state_tensors()[key])
    third.close()


def test_a_step_whose_loss_is_not_finite_in_one_worker_is_skipped_by_all(small, monkeypatch):
    class Poisoned(SequenceWorker):
        def _forward_backward(self, blocks):
            loss, states = super()._forward_backward(blocks)
            return loss * (math.nan if self.step == 3 and self.worker == 1 else 1.0), states

    monkeypatch.setattr(in_process, "SequenceWorker", Poisoned)
    whole, sharded = (InProcessRun(small(*TWO, *extra)).train() for extra in ((), (FULL,)))
    assert [row["skipped"] for row in sharded.worker.report(0).rows] == [0, 0, 0, 1, 1, 1]
    assert digest_plainly(sharded.parameters) == digest_plainly(whole.parameters)


def test_a_worker_has_its_share_two_blocks_of_the_rest_at_a_time_and_the_gradient_of_what_it_owns(small):
    """One of two workers, the other one of which sends the initial values and adds nothing."""
    config = small("model.layers=6", "sequence.workers=2", FULL, "sequence.recompute_blocks=true")
    model, reference = (build_model(config, config.model.vocab_size, device=d, seed=s) for d, s in (("meta", None), ("cpu", 0)))
    initial = {name: p.detach().clone() for name, p in reference.named_parameters()}
    sent = []

    class Done:
        def wait(self):
            return True

    class OneOfTwo(DataParallelGroup):
        def broadcast(self, tensor, owner):
            for name, p in sequence_parameters(model).items():
                if p.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
                    p.data.copy_(initial[name])
            return Done()

        def reduce(self, tensor, owner):
            sent.append(tensor.double().square().sum().item())
            return Done()

    shards = ShardedParameters(model, OneOfTwo(0, 2, torch.device("cpu")), torch.device("cpu"))
    place_parameters(model, {n: initial[n].clone() for level in level_parameters(model).values() for n in level})
    for name, p in shards.owned.items():
        p.data.copy_(initial[name])
    rest = [[p for n, p in sequence_parameters(model).items() if f"blocks.{i}." in n and n not in shards.owned] for i in range(6)]

    def blocks_here() -> int:
        return sum(any(p.untyped_storage().nbytes() > 0 for p in block) for block in rest)

    counts = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: counts.append(blocks_here()))
    blocks = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(0))
    for each in (model, reference):
        each.token_losses(blocks)[0].sum().backward()
    shards.finish_backward()
    shards.finish_gradients()
    assert len(counts) == 12 and max(counts) == 2 and blocks_here() == 0
    expected = {n: p.grad for n, p in sequence_parameters(reference).items() if p.grad is not None}
    for name, p in shards.owned.items():
        assert torch.equal(p.grad, expected.get(name, torch.zeros_like(p)))
    assert sum(sent) == pytest.approx(sum(g.double().square().sum().item() for g in expected.values()))
    halves = [sum(p.numel() for p in parameters.values()) for parameters in (shards.owned, sequence_parameters(model))]
    assert halves[0] < 0.55 * halves[1]


def test_what_a_worker_holds_is_counted_and_one_worker_keeps_all():
    whole, sharded = (load_config("tiny", ["sequence.workers=4", *extra]) for extra in ([], [FULL]))
    costs = [RunPlan.build(config, 257).nested_system.actors[0] for config in (whole, sharded)]
    assert costs[1].optimizer < 0.35 * costs[0].optimizer and costs[1].parameters < costs[0].parameters
    assert not load_config("tiny", [FULL]).sequence.is_sharded
