"""The data-parallel group of the sequence workers: torch.distributed, gloo on CPU and NCCL on GPU.

Gradients are summed in fixed buckets while backward still runs. Buckets never depend on timing or on earlier steps, so the
order of summation, and with it every bit, is the same after a resume.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nlray.actors.types import Command
from nlray.errors import NlrayError
from nlray.levels.flat_buffers import FlatLayout
from nlray.levels.plan import TensorSpec

BUCKET_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """What all workers know after a step's all-reduce. loss: mean over the global batch, nats per token."""

    loss: float
    is_finite: bool
    command: Command


class DataParallelGroup:
    """The workers of a run; alone (`num_workers` 1) it needs no process group and changes nothing."""

    def __init__(self, worker: int, num_workers: int, device: torch.device) -> None:
        self.worker, self.num_workers, self.device = worker, num_workers, device
        self._group: dist.ProcessGroup | None = None
        self._buckets: list[Bucket] = []
        self._next_bucket = 0
        self._is_armed = False

    def join(self, store: dist.Store, timeout_s: float) -> None:
        """Enter the group; returns when all workers have.

        Not torch's default group: that one is counted, and a process in which an earlier start was cut short would look for the others
        under another number.
        """
        kind: Any = dist.ProcessGroupNCCL if self.device.type == "cuda" else dist.ProcessGroupGloo
        self._group = kind(store, self.worker, self.num_workers, timedelta(seconds=timeout_s))

    @property
    def _joined(self) -> dist.ProcessGroup:
        if self._group is None:
            raise NlrayError(f"sequence worker {self.worker} is not in the group of the workers")
        return self._group

    def leave(self) -> None:
        """End the group; whoever waits for this worker in it gets an error."""
        # What was summed in it last would keep its connections open, and with them whoever waits at the other end.
        for bucket in self._buckets:
            bucket.forget()
        group, self._group = self._group, None
        if group is not None:
            group.abort()

    def register_buckets(self, parameters: dict[str, nn.Parameter]) -> None:
        """Prepare buckets for these parameters' gradients, in the order in which backward makes them."""
        if self.num_workers == 1:
            return
        pending: dict[str, nn.Parameter] = {}
        for name, parameter in reversed(parameters.items()):
            pending[name] = parameter
            if 4 * sum(p.numel() for p in pending.values()) >= BUCKET_BYTES:
                self._buckets.append(Bucket(pending))
                pending = {}
        if pending:
            self._buckets.append(Bucket(pending))
        for bucket in self._buckets:
            for index, parameter in enumerate(bucket.parameters):
                parameter.register_post_accumulate_grad_hook(lambda p, b=bucket, i=index: self._on_gradient(b, i, p))

    def arm(self) -> None:
        """Say that the backward pass to come is the step's last: its gradients are complete."""
        self._is_armed = self.num_workers > 1
        self._next_bucket = 0
        for bucket in self._buckets:
            bucket.reset()

    def finish_gradients(self) -> None:
        """Wait until every watched gradient is the sum over all workers; `.grad` then views the buckets."""
        if self.num_workers == 1:
            return
        self._is_armed = False
        self._launch(include_incomplete=True)
        for bucket in self._buckets:
            bucket.finish()

    def agree(self, loss_share: Tensor, norm: Tensor, command: Command) -> Agreement:
        """Add up the workers' shares of the mean loss and join their flags and worker 0's command: one synchronisation a step."""
        loss, norm_value = torch.stack([loss_share.detach().double(), norm.double()]).tolist()
        is_finite = math.isfinite(loss) and math.isfinite(norm_value)
        if self.num_workers == 1:
            return Agreement(loss=loss, is_finite=is_finite, command=command)
        message = torch.tensor(
            [loss if math.isfinite(loss) else 0.0, 0.0 if is_finite else 1.0, float(command)], dtype=torch.float64, device=self.device
        )
        self._joined.allreduce([message]).wait()
        loss, num_bad, commands = message.tolist()
        return Agreement(loss=loss if num_bad == 0 else math.nan, is_finite=num_bad == 0, command=Command(int(commands)))

    def sum(self, values: Iterable[float]) -> list[float]:
        """Return the sums over the workers, in float64."""
        message = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        if self.num_workers > 1:
            self._joined.allreduce([message]).wait()
        return message.tolist()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over the workers, in place."""
        self._joined.allreduce([tensor]).wait()
        return tensor

    def broadcast(self, tensor: Tensor, owner: int) -> dist.Work:
        """Begin to copy one worker's tensor into everyone's."""
        options = dist.BroadcastOptions()
        options.rootRank = owner
        return self._joined.broadcast([tensor], options)

    def reduce(self, tensor: Tensor, owner: int) -> dist.Work:
        """Begin to add a tensor up over the workers, in the owner's; the others' is worth nothing afterwards."""
        options = dist.ReduceOptions()
        options.rootRank = owner
        return self._joined.reduce([tensor], options)

    def _on_gradient(self, bucket: "Bucket", index: int, parameter: nn.Parameter) -> None:
        if self._is_armed:
            assert parameter.grad is not None
            bucket.add(index, parameter.grad)
            self._launch(include_incomplete=False)

    def _launch(self, *, include_incomplete: bool) -> None:
        # In the same order in every worker, whatever order the gradients came in.
        while self._next_bucket < len(self._buckets):
            bucket = self._buckets[self._next_bucket]
            if bucket.num_missing > 0 and not include_incomplete:
                return
            bucket.launch(self._joined)
            self._next_bucket += 1


class Bucket:
    """Gradients that are summed in one message."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = list(parameters.values())
        layout = FlatLayout([TensorSpec(n, tuple(p.shape)) for n, p in parameters.items()])
        self._flat = layout.new_buffer(self.parameters[0].device)
        self._views = layout.views(self._flat)
        self._work: dist.Work | None = None
        self.num_missing = 0

    def reset(self) -> None:
        self._flat.zero_()
        self.num_missing = len(self.parameters)

    def add(self, index: int, gradient: Tensor) -> None:
        self._views[index].copy_(gradient)
        self.num_missing -= 1

    def launch(self, group: dist.ProcessGroup) -> None:
        self._work = group.allreduce([self._flat])

    def forget(self) -> None:
        """Drop a sum that may never end."""
        self._work = None

    def finish(self) -> None:
        assert self._work is not None, "the bucket was not launched"
        # Not by a name of its own: where this raises, the traceback would keep the sum, which `forget` has to drop.
        self._work.wait()
        self._work = None
        for parameter, view in zip(self.parameters, self._views, strict=True):
            parameter.grad = view
