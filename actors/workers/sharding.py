"""The sequence parameters dealt over the workers (`sequence.shard: full`), so that a model larger than one device trains.

Each tensor, whole, belongs to one worker, which keeps it and its optimizer state, as the tensors of a level belong to its ranks. The
others have it while a block of the model computes: it comes before the block's forward and its backward pass, one block ahead of the
computation, and goes after them. Gradients go to the owner, summed over the workers, a block at a time.

Not torch's `fully_shard`: that cuts every tensor by rows, where Muon and M3 need whole matrices, and so do a checkpoint and its digest;
and a DeviceMesh needs torch's default group, which a process that begins anew after a fault must not count on (`DataParallelGroup.join`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nlray.actors.workers.data_parallel import DataParallelGroup
from nlray.levels.flat_buffers import FlatLayout
from nlray.levels.plan import TensorSpec, deal_tensors
from nlray.models.lm import LanguageModel, block_of, place_parameters, sequence_parameters
from nlray.optimizers import tensor_norms


class ShardedParameters:
    """The sequence parameters of a model in one of several workers; hooks on the model bring and take away those of the others.

    Every forward pass is a joint one: all workers do equally many, each with its backward pass or without.

    Args:
        model: on the meta device; its sequence parameters get their place on `device`, unset.
        group: the workers.
        device: where the model computes.
    """

    def __init__(self, model: LanguageModel, group: DataParallelGroup, device: torch.device) -> None:
        self.group = group
        specs = [TensorSpec(name, tuple(p.shape)) for name, p in sequence_parameters(model).items()]
        shares = deal_tensors(specs, group.num_workers)
        self._blocks = [Unit(_part_of(shares, block), group, device) for block in range(len(model.blocks))]
        # Before the first block and after the last: there from the beginning of a forward pass to the end of the backward pass.
        self._outside = Unit(_part_of(shares, None), group, device)
        self._units = [self._outside, *self._blocks]
        place_parameters(model, {name: p for unit in self._units for name, p in unit.parameters.items()})
        placed = sequence_parameters(model)
        self.owned = {name: p for name, p in placed.items() if name in {spec.name for spec in shares[group.worker]}}
        """This worker's own, in model order."""
        for unit in self._units:
            unit.parameters = {name: placed[name] for name in unit.parameters}
        self._indices = [index for index, spec in enumerate(specs) if spec.name in self.owned]
        self._num_tensors = len(specs)
        self._in_backward = False
        self._sending: Unit | None = None
        self._hook(model)

    def finish_backward(self) -> None:
        """Send what the backward pass has left to send, and wait until this worker's share of all gradients is summed."""
        self._send(self._blocks[0])
        self._send(self._outside)
        self._settle()
        self._in_backward = False
        assert all(p.grad is None for unit in self._units for p in unit.parameters.values()), "a gradient came after its block's"

    def finish_gradients(self) -> None:
        """Leave the sums over all workers and backward passes of a step in `.grad` of the owned parameters."""
        for unit in self._units:
            unit.hand_over_sums()

    def all_norms(self) -> Tensor:
        """Return the norms of all gradients in model order, [number of tensors] float32, from those of each worker's own."""
        norms = torch.zeros(self._num_tensors, device=self.group.device)
        if self.owned:
            norms[self._indices] = tensor_norms([p.grad for p in self.owned.values() if p.grad is not None])
        return self.group.sum_(norms)

    def forget(self) -> None:
        """Drop messages that may never end."""
        for unit in self._units:
            unit.forget()

    # The passes.

    def _hook(self, model: LanguageModel) -> None:
        model.register_forward_pre_hook(lambda module, args: self._begin_forward())
        model.register_forward_hook(lambda module, args, output: self._end_forward())
        for index, block in enumerate(model.blocks):
            block.register_forward_pre_hook(lambda module, args, i=index: self._before_forward(i))
            block.register_forward_hook(lambda module, args, output, i=index: self._after_forward(i, output[0]))

    def _begin_forward(self) -> None:
        self._outside.begin_gather()
        self._blocks[0].begin_gather()
        self._outside.gather()

    def _end_forward(self) -> None:
        if not torch.is_grad_enabled():
            self._outside.release()

    def _before_forward(self, index: int) -> None:
        # With recompute_blocks a block is computed once more within its backward pass, for which it is there already.
        if not self._in_backward:
            self._blocks[index].gather()
            if index + 1 < len(self._blocks):
                self._blocks[index + 1].begin_gather()

    def _after_forward(self, index: int, x_BTD: Tensor) -> None:
        if self._in_backward:
            return
        if torch.is_grad_enabled():
            x_BTD.register_hook(lambda gradient: self._before_backward(index))
            if index + 1 == len(self._blocks):
                return
        self._blocks[index].release()

    def _before_backward(self, index: int) -> None:
        """The gradient at the block's output is there. The engine runs later operations first, so the block after it is done."""
        self._in_backward = True
        if index + 1 < len(self._blocks):
            self._send(self._blocks[index + 1])
        self._blocks[index].gather()
        if index > 0:
            self._blocks[index - 1].begin_gather()

    def _send(self, unit: "Unit") -> None:
        # One block's gradients are under way at a time: that bounds the memory.
        self._settle()
        unit.send_gradients()
        unit.release()
        self._sending = unit

    def _settle(self) -> None:
        if self._sending is not None:
            self._sending.fetch_sums()
            self._sending = None


@dataclass(kw_only=True)
class Part:
    """What one worker owns of a unit. flat: the parameters' memory; the others' copies have none but for a while."""

    owner: int
    layout: FlatLayout
    flat: Tensor
    sums: Tensor | None = None
    """Of the owner: the gradients of the step's backward passes so far, summed over the workers."""


class Unit:
    """The parameters that come and go together.

    Args:
        shares: what each worker owns of them.
        group: the workers.
        device: where they are.
    """

    def __init__(self, shares: Sequence[Sequence[TensorSpec]], group: DataParallelGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.parameters: dict[str, Tensor] = {}
        self._parts: list[Part] = []
        self._gathering: list[dist.Work] = []
        self._sending: list[tuple[Part, Tensor, dist.Work]] = []
        for owner, specs in enumerate(shares):
            if specs:
                layout = FlatLayout(specs)
                self._parts.append(Part(owner=owner, layout=layout, flat=layout.new_buffer(device)))
                self.parameters |= {s.name: view for s, view in zip(specs, layout.views(self._parts[-1].flat), strict=True)}
        self._is_here = True
        self.release()

    @property
    def _others(self) -> list[Part]:
        return [part for part in self._parts if part.owner != self.group.worker]

    def begin_gather(self) -> None:
        """Ask for what is not here; it comes beside the computation."""
        if self._is_here:
            return
        for part in self._others:
            part.flat.untyped_storage().resize_(part.layout.size_bytes)
        self._gathering = [self.group.broadcast(part.flat, part.owner) for part in self._parts]
        self._is_here = True

    def gather(self) -> None:
        """Wait until everything is here."""
        self.begin_gather()
        works, self._gathering = self._gathering, []
        for work in works:
            work.wait()

    def release(self) -> None:
        """Let go of the memory of what others own."""
        if self._is_here:
            for part in self._others:
                part.flat.untyped_storage().resize_(0)
            self._is_here = False

    def send_gradients(self) -> None:
        """Begin to add up the workers' gradients, each at its owner; `.grad` is empty afterwards."""
        for part in self._parts:
            buffer = part.layout.new_buffer(self.device)
            for spec, view in zip(part.layout.specs, part.layout.views(buffer), strict=True):
                parameter = self.parameters[spec.name]
                # One that the loss does not reach has none: zeros.
                if parameter.grad is not None:
                    view.copy_(parameter.grad)
                    parameter.grad = None
            self._sending.append((part, buffer, self.group.reduce(buffer, part.owner)))

    def fetch_sums(self) -> None:
        """Wait for the sums; the owner adds them to those of the step's earlier backward passes."""
        sending, self._sending = self._sending, []
        for part, buffer, work in sending:
            work.wait()
            if part.owner == self.group.worker:
                part.sums = buffer if part.sums is None else part.sums.add_(buffer)

    def hand_over_sums(self) -> None:
        """Make the sums the gradients of the owned parameters."""
        for part in self._parts:
            if part.sums is not None:
                for spec, view in zip(part.layout.specs, part.layout.views(part.sums), strict=True):
                    self.parameters[spec.name].grad = view
                part.sums = None

    def forget(self) -> None:
        """Drop messages that may never end."""
        self._gathering, self._sending = [], []


def _part_of(shares: Sequence[Sequence[TensorSpec]], block: int | None) -> list[list[TensorSpec]]:
    """Return what of each share belongs to a block, or (None) to none."""
    return [[spec for spec in share if block_of(spec.name) == block] for share in shares]
