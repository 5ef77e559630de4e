"""The two-layer residual memory M(z) = z + W_1 silu(W_2 z) (Eq. 89, 91), a chunk at a time.

The derivation is in README.md beside this file, the same function token by token in reference.py. The interface is that of
nlray/memories/scan.py: ChunkedMemory. Letters beside those of nlray/memories/layer.py: Z the hidden width.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nlray.config import ModelConfig
from nlray.memories.layer import Coefficients, Layer, answer_at_start, close, read, renewed, rows_of, write
from nlray.memories.problems import box_problems
from nlray.memories.scan import GATE_BOXES, MEMORY_NOISE, BoxTensor, ChunkedMemory, MemoryProblem, MemoryWeights, Tokens
from nlray.models.layers import normal


class Layers(NamedTuple):
    """The layers of all boxes: those that answer with a vector first, the main one the last of them, then the gates."""

    hidden: Layer
    """W_2 of all boxes; they share their input, so their rows are stacked: [H, 1, B, boxes Z, d]."""
    out: Mapping[str, Layer]
    """W_1, each box with an input of its own: `vectors` [H, boxes, B, d, Z], `gates` [H, boxes, B, 1, Z] where there are any."""


class MLPMemory(ChunkedMemory):
    """Every phase of an MLP memory, with delta gradient descent or gradient descent, with or without momentum.

    The state is [B, H, S], all layers of a head one after the other in the order of `_stack`; as changes since the initial memories
    (retain: init) or as they are (retain: zero); with momentum as many values again.
    """

    # There are about ten times as many intermediate results as inputs of a chunk.
    recomputes = True

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.groups = {
            "vectors": tuple(box for box in model.boxes if box not in GATE_BOXES),
            "gates": tuple(box for box in model.boxes if box in GATE_BOXES),
        }
        self.groups = {group: boxes for group, boxes in self.groups.items() if boxes}

    def box_tensors(self, box: str) -> dict[str, BoxTensor]:
        """Return the initial W_1 and W_2: the memory starts near the identity, a gate near zero."""
        heads, width, hidden = self.model.heads, self.model.head_dim, self.model.box_hidden
        # Small but not zero: W_2 has no gradient behind a zero W_1.
        out = BoxTensor((heads, 1 if box in GATE_BOXES else width, hidden), normal(MEMORY_NOISE))
        return {"_1": out, "_2": BoxTensor((heads, hidden, width), normal(width**-0.5))}

    def problems(self) -> list[MemoryProblem]:
        return box_problems(self.model, self.box_values())

    def _initial_fast_weights(self, batch_size: int, weights: MemoryWeights) -> Tensor:
        values_HS = torch.cat([tensor.flatten(1) for tensor in self._stack(weights)], dim=1)
        if self.model.retain == "init":
            values_HS = torch.zeros_like(values_HS)
        if self.model.momentum:
            values_HS = torch.cat([values_HS, torch.zeros_like(values_HS)], dim=1)
        return values_HS.expand(batch_size, *values_HS.shape).clone()

    def _layers(self, weights: MemoryWeights, fast_weights: Tensor) -> Layers:
        anchors = self._stack(weights)
        count = 2 if self.model.momentum else 1
        sizes = [anchor[0].numel() for anchor in anchors]
        pieces_HBS = fast_weights.transpose(0, 1).split(sizes * count, dim=2)
        # To [H, G, B, V, K].
        parts = [piece.unflatten(2, anchor.shape[1:]).transpose(1, 2) for piece, anchor in zip(pieces_HBS, anchors * count, strict=True)]
        changes, momenta = parts[: len(anchors)], parts[len(anchors) :] or [None] * len(anchors)
        # Departs from Eq. 88, 91 with retain "init": alpha acts on the change since the initial memory, not on the weights.
        if self.model.retain == "zero":
            anchors = [None] * len(anchors)
        hidden, *out = (Layer(*layer) for layer in zip(anchors, changes, momenta, strict=True))
        return Layers(hidden, dict(zip(self.groups, out, strict=True)))

    def _fast_weights(self, layers: Layers) -> Tensor:
        every = [layers.hidden, *layers.out.values()]
        parts = [layer.change_HGBVK for layer in every] + [layer.momentum_HGBVK for layer in every if layer.momentum_HGBVK is not None]
        return torch.cat([part.transpose(1, 2).flatten(2) for part in parts], dim=2).transpose(0, 1)

    def _renewed(self, starts: Layers, layers: Layers, boxes: tuple[str, ...]) -> Layers:
        is_new = {group: [box in boxes for box in members] for group, members in self.groups.items()}
        every = [new for group in is_new.values() for new in group]
        hidden = renewed(starts.hidden, layers.hidden, [self.model.box_hidden] * len(every), every, -2)
        return Layers(
            hidden, {group: renewed(starts.out[group], layers.out[group], [1] * len(new), new, 1) for group, new in is_new.items()}
        )

    def _project(self, starts: Layers, x_HGBCd: Tensor) -> dict[str, Tensor]:
        answers = self._answers(starts, x_HGBCd, F.silu(self._hidden(starts, x_HGBCd)))
        return {box: answers[group][:, i : i + 1] for group, boxes in self.groups.items() for i, box in enumerate(boxes) if box != "mem"}

    def _update(self, layers: Layers, starts: Layers, tokens: Tokens) -> tuple[Tensor, Layers]:
        k_HGBCd, coefficients, forgets = tokens.k_HGBCd, tokens.coefficients, self.model.forgets
        a_HGBCZ = self._hidden(starts, k_HGBCd)
        h_HGBCZ = F.silu(a_HGBCZ)
        h = self._by_group(h_HGBCZ)
        targets = self._targets(starts, tokens, h_HGBCZ)
        # Backwards through W_1 and silu: minus the gradient at the hidden layer, as the targets are at the output.
        back = torch.cat([answer_at_start(_transposed(out), targets[group]) for group, out in starts.out.items()], dim=1)
        slope_HGBCZ = torch.sigmoid(a_HGBCZ)
        slope_HGBCZ = slope_HGBCZ * (1 + a_HGBCZ * (1 - slope_HGBCZ))
        w_hidden = write(layers.hidden, k_HGBCd, _stacked(back * slope_HGBCZ), coefficients, forgets=forgets)
        own = {group: _own_rate(coefficients, h[group]) if forgets else coefficients for group in h}
        w_out = {group: write(out, h[group], targets[group], own[group], forgets=forgets) for group, out in layers.out.items()}

        after = Layers(
            close(layers.hidden, k_HGBCd, w_hidden, coefficients),
            {group: close(out, h[group], w_out[group], coefficients) for group, out in layers.out.items()},
        )
        # Departs from Eq. 90 with read "token": Eq. 90 reads at the chunk's start, so that a token never sees its own chunk.
        if self.model.read == "token":
            hidden, out = self._main(layers)
            h_q_HGBCZ = F.silu(read(hidden, tokens.q_HGBCd, k_HGBCd, w_hidden[..., self._main_rows()], coefficients))
            made_HGBCd = read(out, h_q_HGBCZ, h["vectors"][:, -1:], w_out["vectors"][:, -1:], coefficients)
        else:
            hidden, out = self._main(starts)
            made_HGBCd = answer_at_start(out, F.silu(answer_at_start(hidden, tokens.q_HGBCd)))
        return tokens.q_HGBCd + made_HGBCd, after

    def _targets(self, starts: Layers, tokens: Tokens, h_HGBCZ: Tensor) -> dict[str, Tensor]:
        """Return minus the gradient of the inner objective at every box's output, at the start of its own chunk."""
        v_HGBCd = tokens.v_HGBCd
        if self.model.phase == "self_modifying":
            targets = self._answers(starts, v_HGBCd, F.silu(self._hidden(starts, v_HGBCd)))
        else:
            # Departs from Eq. 81-82: a gate is one number per head, and its value the mean of v.
            values = {"vectors": v_HGBCd, "gates": v_HGBCd.mean(-1, keepdim=True)}
            targets = {group: values[group].expand(-1, len(boxes), -1, -1, -1) for group, boxes in self.groups.items()}
        if self.model.objective == "l2":
            answers = self._answers(starts, tokens.k_HGBCd, h_HGBCZ)
            targets = {group: target - answers[group] for group, target in targets.items()}
        return targets

    def _hidden(self, layers: Layers, z_HGBCd: Tensor) -> Tensor:
        """Return W_2 z of all boxes at the chunk's start, [H, boxes, B, C, Z]."""
        stacked = answer_at_start(layers.hidden, z_HGBCd)
        return stacked.squeeze(1).unflatten(-1, (len(self.model.boxes), self.model.box_hidden)).movedim(-2, 1)

    def _answers(self, layers: Layers, z_HGBCd: Tensor, h_HGBCZ: Tensor) -> dict[str, Tensor]:
        """Return what all boxes answer to z at the chunk's start, by group; h is silu(W_2 z)."""
        h = self._by_group(h_HGBCZ)
        made = {group: answer_at_start(out, h[group]) for group, out in layers.out.items()}
        return made | {"vectors": z_HGBCd + made["vectors"]}

    def _by_group(self, z_HGBCZ: Tensor) -> dict[str, Tensor]:
        """Split what all boxes have, [H, boxes, ...], by group."""
        return dict(zip(self.groups, z_HGBCZ.split([len(boxes) for boxes in self.groups.values()], dim=1), strict=True))

    def _main_rows(self) -> slice:
        """Return the rows of the main memory in the stacked hidden layer."""
        end = len(self.groups["vectors"]) * self.model.box_hidden
        return slice(end - self.model.box_hidden, end)

    def _main(self, layers: Layers) -> tuple[Layer, Layer]:
        """Return W_2 and W_1 of the main memory."""
        out = layers.out["vectors"]
        anchor = None if out.anchor_HGVK is None else out.anchor_HGVK[:, -1:]
        momentum = None if out.momentum_HGBVK is None else out.momentum_HGBVK[:, -1:]
        return rows_of(layers.hidden, self._main_rows()), Layer(anchor, out.change_HGBVK[:, -1:], momentum)

    def _stack(self, weights: MemoryWeights) -> list[Tensor]:
        """Return the initial W_2 of all boxes, [H, 1, boxes Z, d], and each group's W_1, [H, boxes, d or 1, Z]."""
        every = [box for boxes in self.groups.values() for box in boxes]
        hidden = torch.cat([weights.memories[box][1] for box in every], dim=1).unsqueeze(1)
        return [hidden, *(torch.stack([weights.memories[box][0] for box in boxes], dim=1) for boxes in self.groups.values())]


def _transposed(layer: Layer) -> Layer:
    """Return the layer that goes from the outputs back to the inputs."""
    return Layer(None if layer.anchor_HGVK is None else layer.anchor_HGVK.mT, layer.change_HGBVK.mT, None)


def _stacked(z_HGBCZ: Tensor) -> Tensor:
    """Return the boxes' hidden values side by side, [H, 1, B, C, boxes Z]."""
    return z_HGBCZ.movedim(1, -2).flatten(-2).unsqueeze(1)


def _own_rate(coefficients: Coefficients, h_HGBCZ: Tensor) -> Coefficients:
    """Return the coefficients with the rate of a layer whose inputs are not of length 1 (Eq. 57)."""
    eta_HGBC1 = coefficients.eta_HGBC1 / (1 + coefficients.eta_HGBC1 * h_HGBCZ.square().sum(-1, keepdim=True))
    return coefficients._replace(eta_HGBC1=eta_HGBC1)
