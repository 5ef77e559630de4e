"""The sums of a level's gradients over a period, in a sequence worker.

Gradients are added to one of two buffers. At a period's end that buffer is sent while the other one takes over, and later is where
backward puts a step's gradients. With compression there is one buffer: its code is sent, and the buffer keeps what the code leaves out.
"""

import time
from collections.abc import Mapping, Sequence
from queue import Empty, SimpleQueue

import torch
from torch import Tensor

from nlray.actors.ranks.counters import Counters
from nlray.errors import RemoteTimeoutError
from nlray.levels.compression import codec_of, encode_with_feedback
from nlray.levels.flat_buffers import FlatLayout
from nlray.levels.plan import LevelPlan


class GradientBuffers:
    """The open period of one level.

    Args:
        plan: the level.
        device: of the parameters.
        compression: `exchange.compression`.
        counters: the wait for a buffer that is still being sent is added to `stall_s`.
        timeout_s: limit of that wait.
    """

    def __init__(self, plan: LevelPlan, device: torch.device, compression: str, *, counters: Counters, timeout_s: float) -> None:
        self.level, self.counters, self.timeout_s = plan.name, counters, timeout_s
        self.layouts = [FlatLayout(shard) for shard in plan.shards]
        self.names = [spec.name for layout in self.layouts for spec in layout.specs]
        self.num_steps = 0
        """Good steps in the open period."""
        self._codec = codec_of(compression)
        self._open = [layout.new_buffer(device) for layout in self.layouts]
        self._open_views = self.views(self._open)
        self._free: SimpleQueue[list[Tensor]] = SimpleQueue()
        if self._codec is None:
            self._free.put([layout.new_buffer(device) for layout in self.layouts])
        self._spare: list[Tensor] | None = None
        self._is_added = False

    def begin_step(self, parameters: Sequence[Tensor]) -> None:
        """Set the `.grad` of the parameters, in the order of `names`, to where backward adds the step's gradients up.

        That is the open buffer while nothing is in it. Later it is the other one, since a skipped step must leave the sums as they were.
        Where that one is still being sent, or with compression, autograd makes a tensor for each gradient.
        """
        if self._codec is not None:
            return
        if self.num_steps > 0:
            try:
                self._spare = self._free.get_nowait()
            except Empty:
                return
        self._is_added = self._spare is None
        buffers = self._open if self._spare is None else self._spare
        for buffer in buffers:
            buffer.zero_()
        for parameter, view in zip(parameters, self.views(buffers), strict=True):
            parameter.grad = view

    def accumulate(self, gradients: Mapping[str, Tensor]) -> None:
        """Add a step's gradients, by parameter name, to the open period, if they are not in it yet."""
        ordered = [gradients[name] for name in self.names]
        if self.num_steps == 0 and self._codec is None:
            if not self._is_added:
                torch._foreach_copy_(self._open_views, ordered)
        else:
            torch._foreach_add_(self._open_views, ordered)
        self.num_steps += 1

    def end_step(self) -> None:
        """Free what the step used."""
        self._is_added = False
        if self._spare is not None:
            self._free.put(self._spare)
            self._spare = None

    def close_period(self, version: int) -> list[Tensor]:
        """Return what the ranks get for `version`, one tensor a rank, and begin the next period; `release` takes it back once it is sent.

        Raises:
            RemoteTimeoutError: the period before is still being sent.
        """
        if self._codec is None:
            full = self._swap(version)
        elif self.num_steps > 0:
            full = [encode_with_feedback(self._codec, buffer) for buffer in self._open]
        else:
            # What is left of earlier periods waits for one with a step in it; of this one a rank looks at the number of steps only.
            full = [torch.empty(0, dtype=torch.uint8) for _ in self._open]
        self.num_steps = 0
        return full

    def _swap(self, version: int) -> list[Tensor]:
        full, started = self._open, time.perf_counter()
        try:
            self._open = self._free.get(timeout=self.timeout_s)
        except Empty as error:
            raise RemoteTimeoutError(
                f"level {self.level}: waited {self.timeout_s:g} s to send version {version - 1} (run.timeout_s)"
            ) from error
        self.counters.stall_s += time.perf_counter() - started
        self._open_views = self.views(self._open)
        return full

    def release(self, full: list[Tensor]) -> None:
        """Take back what `close_period` returned; from any thread."""
        if self._codec is None:
            self._free.put(full)

    def sums(self, full: list[Tensor]) -> dict[str, Tensor]:
        """Return the sums, by name, that the ranks get from what `close_period` returned.

        Uncompressed they are views of it, which the next step does not change.
        """
        if self._codec is not None:
            full = [self._codec.decode(code, layout.size) for code, layout in zip(full, self.layouts, strict=True)]
        return dict(zip(self.names, self.views(full), strict=True))

    def accumulators(self) -> dict[str, Tensor]:
        """Return copies of the open period's sums by parameter name; none if there is nothing in them yet."""
        if self.num_steps == 0 and self._codec is None:
            return {}
        return {name: view.clone() for name, view in zip(self.names, self._open_views, strict=True)}

    def load(self, sums: Mapping[str, Tensor], num_steps: int) -> None:
        """Continue an open period that `num_steps` good steps are in; `sums` may be empty (zeros)."""
        for name, view in zip(self.names, self._open_views, strict=True):
            view.copy_(sums[name]) if sums else view.zero_()
        self.num_steps = num_steps

    def views(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors that lie in flat buffers, one buffer a rank, in the order of `names`."""
        return [view for layout, buffer in zip(self.layouts, buffers, strict=True) for view in layout.views(buffer)]
