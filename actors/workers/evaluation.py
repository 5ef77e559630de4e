"""The held-out loss of a run, computed by all of its sequence workers together."""

import torch

from nlray.actors.workers.replica import ModelReplica
from nlray.evals.heldout import block_losses
from nlray.pipelines.source_list import FileList
from nlray.pipelines.stream import Batch, heldout_blocks

HELDOUT_SEED = 0  # not run.seed: runs of different seeds are compared on the same sequences


class HeldoutEvaluation:
    """One worker's part of the evaluations.

    Args:
        replica: the model that is evaluated.
        files: of the data sources; None: as they are found.
    """

    def __init__(self, replica: ModelReplica, files: FileList | None) -> None:
        self.config, self.replica, self.files = replica.config, replica, files
        self._heldout: Batch | None = None

    @property
    def is_enabled(self) -> bool:
        return self.config.eval.sequences > 0 and self.config.data.eval_fraction > 0

    def is_due(self, step: int) -> bool:
        """Return whether the loss is evaluated after a step that is not the last."""
        return self.config.eval.every > 0 and step % self.config.eval.every == 0

    def load(self) -> Batch:
        """Return the held-out sequences, read once; raise DataError where there are none."""
        if self._heldout is None:
            num_blocks, seq_len = self.config.eval.sequences, self.config.model.seq_len
            self._heldout = heldout_blocks(self.config.data, seq_len=seq_len, seed=HELDOUT_SEED, num_blocks=num_blocks, files=self.files)
        return self._heldout

    def evaluate(self) -> tuple[float, dict[str, float]]:
        """Return the mean held-out loss in nats per token, and that of each tag value (`column=value`).

        The sequences are the same every time; the workers share them.
        """
        heldout, group, device = self.load(), self.replica.group, self.replica.device
        sequence, is_sharded = self.config.sequence, self.replica.shards is not None
        tags = [[f"{column}={value}" for column, value in block.items()] for block in heldout.tags]
        names = sorted({name for of_block in tags for name in of_block})
        mine = slice(group.worker, None, group.num_workers)
        blocks = torch.from_numpy(heldout.blocks[mine]).to(device)
        if is_sharded:
            # All do equally many forward passes.
            num_missing = -(-len(tags) // group.num_workers) - len(blocks)
            blocks = torch.cat([blocks, torch.from_numpy(heldout.blocks[:1]).to(device).expand(num_missing, -1)])
        sums = dict.fromkeys(["", *names], 0.0)
        counts = dict(sums)
        if len(blocks) > 0:
            with self.replica.autocast():
                losses = block_losses(self.replica.model, blocks, batch_size=sequence.micro_batch_size).sum(1).tolist()
            for loss, of_block in zip(losses, tags[mine], strict=not is_sharded):
                for name in ("", *of_block):
                    sums[name] += loss
                    counts[name] += self.config.model.seq_len
        totals = group.sum([*sums.values(), *counts.values()])
        means = {name: total / count for name, total, count in zip(sums, totals, totals[len(sums) :], strict=False)}
        return means.pop(""), means
