"""The two-layer residual memory M(z) = z + W_1 silu(W_2 z) (Eq. 89, 91), a chunk at a time.

README.md in this folder has the derivation, reference.py the same function token by token. The class is a ChunkedMemory
(nlray/memories/scan.py). Letters in addition to those of nlray/memories/layer.py: Z the hidden width.
"""

import torch
from torch import Tensor

from nlray.config import ModelConfig
from nlray.memories.mlp.linear import Linear
from nlray.memories.mlp.update import Layers, Settings, project, update
from nlray.memories.problems import component_problems
from nlray.memories.scan import GATE_COMPONENTS, MEMORY_NOISE, ChunkedMemory, ComponentTensor, MemoryProblem, MemoryWeights, Tokens
from nlray.nn.layers import normal


class MLPMemory(ChunkedMemory):
    """Every phase of an MLP memory, with delta gradient descent or gradient descent, with or without momentum.

    The state is [B, H, S]: for each head the W_2 of all components, then the W_1 of each group, in the order of `groups`. The
    values are changes since the initial memories (retain: init) or the weights themselves (retain: zero). With momentum as many
    values follow. Within a chunk the state is a `Layers`, which has the gates first.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        titans = model.titans
        if titans.recompute_chunks is None:
            # Five memories leave about ten times as much as a chunk's inputs are; one leaves little more than its states are.
            self.recomputes = titans.phase != "static"
        self.groups = {
            "vectors": tuple(component for component in titans.components if component not in GATE_COMPONENTS),
            "gates": tuple(component for component in titans.components if component in GATE_COMPONENTS),
        }
        self.groups = {group: components for group, components in self.groups.items() if components}
        # In the order of Layers.
        self.order = (*self.groups.get("gates", ()), *self.groups["vectors"])
        makes_values = titans.phase == "self_modifying"
        num_vectors = len(self.groups["vectors"])
        self.settings = Settings(len(self.order) - num_vectors, num_vectors, titans.objective, titans.read, titans.forgets, makes_values)

    def component_tensors(self, component: str) -> dict[str, ComponentTensor]:
        """Return the initial W_1 and W_2: the memory starts near the identity, a gate near zero."""
        heads, width, hidden = self.model.heads, self.model.head_dim, self.model.memory_hidden
        # Small but not zero: W_2 has no gradient behind a zero W_1.
        out = ComponentTensor((heads, 1 if component in GATE_COMPONENTS else width, hidden), normal(MEMORY_NOISE))
        return {"_1": out, "_2": ComponentTensor((heads, hidden, width), normal(width**-0.5))}

    def problems(self) -> list[MemoryProblem]:
        return component_problems(self.model, self.component_values())

    def _initial_fast_weights(self, batch_size: int, weights: MemoryWeights) -> Tensor:
        values_HS = torch.cat([tensor.flatten(1) for tensor in self._stack(weights)], dim=1)
        if self.titans.retain == "init":
            values_HS = torch.zeros_like(values_HS)
        if self.titans.momentum:
            values_HS = torch.cat([values_HS, torch.zeros_like(values_HS)], dim=1)
        return values_HS.expand(batch_size, *values_HS.shape).clone()

    def _layers(self, weights: MemoryWeights, fast_weights: Tensor) -> Layers:
        anchors = self._stack(weights)
        count = 2 if self.titans.momentum else 1
        pieces_BHS = fast_weights.split([anchor[0].numel() for anchor in anchors] * count, dim=2)
        # To [G, H, B, V, K], and the anchors to [G, H, V, K].
        parts = [
            piece.unflatten(2, anchor.shape[1:]).permute(2, 1, 0, 3, 4) for piece, anchor in zip(pieces_BHS, anchors * count, strict=True)
        ]
        anchors = [anchor.transpose(0, 1) for anchor in anchors]
        changes, momenta = parts[: len(anchors)], parts[len(anchors) :] or [None] * len(anchors)
        layers = []
        for i, (anchor, change, momentum) in enumerate(zip(anchors, changes, momenta, strict=True)):
            if i == 0:
                anchor, change, momentum = (None if tensor is None else self._roll(tensor) for tensor in (anchor, change, momentum))
            # Departs from Eq. 88, 91 with retain "init": alpha acts on the change since the initial memory, not on the weights.
            anchor = anchor.contiguous() if self.titans.retain == "init" else None
            weight = change if anchor is None else anchor[:, :, None] + change
            flat = (None if tensor is None else tensor.flatten(1, 2).contiguous() for tensor in (weight, momentum))
            layers.append(Linear(anchor, *flat))
        hidden, vectors, *gates = layers
        return Layers(hidden, gates[0] if gates else None, vectors)

    def _fast_weights(self, layers: Layers) -> Tensor:
        every = [layer for layer in (layers.hidden, layers.vectors, layers.gates) if layer is not None]
        changes, momenta = [], []
        for layer in every:
            split = (self.model.heads, -1)
            change = layer.weight_GXVK.unflatten(1, split)
            changes.append(change if layer.anchor_GHVK is None else change - layer.anchor_GHVK[:, :, None])
            momenta += [] if layer.momentum_GXVK is None else [layer.momentum_GXVK.unflatten(1, split)]
        for parts in filter(None, (changes, momenta)):
            parts[0] = self._roll(parts[0], back=True)
        return torch.cat([part.permute(2, 1, 0, 3, 4).flatten(2) for part in changes + momenta], dim=2)

    def _roll(self, rows: Tensor, *, back: bool = False) -> Tensor:
        """Return the stacked rows with those of the gates first, from last; or back."""
        shift = self.settings.num_gates * self.model.memory_hidden
        return torch.roll(rows, -shift if back else shift, dims=-2) if shift else rows

    def _renewed(self, starts: Layers, layers: Layers, components: tuple[str, ...]) -> Layers:
        is_new, num_gates = [component in components for component in self.order], self.settings.num_gates

        def mixed(old: Linear | None, new: Linear | None, size: int, dim: int, is_new: list[bool]) -> Linear | None:
            if new is None:
                return None
            pairs = zip(old.weight_GXVK.split(size, dim), new.weight_GXVK.split(size, dim), is_new, strict=True)
            return Linear(None, torch.cat([after if is_newer else before for before, after, is_newer in pairs], dim), None)

        return Layers(
            mixed(starts.hidden, layers.hidden, self.model.memory_hidden, 2, is_new),
            mixed(starts.gates, layers.gates, 1, 0, is_new[:num_gates]),
            mixed(starts.vectors, layers.vectors, 1, 0, is_new[num_gates:]),
        )

    def _project(self, starts: Layers, x_HGBCd: Tensor) -> dict[str, Tensor]:
        answers = [answer for group in project(x_HGBCd.flatten(0, 2), starts) for answer in group]
        return {component: answer.view(*x_HGBCd.shape[:-1], -1) for component, answer in zip(self.order[:-1], answers, strict=True)}

    def _update(self, layers: Layers, starts: Layers, tokens: Tokens) -> tuple[Tensor, Layers]:
        k_XCd, v_XCd, q_XCd = (z_HGBCd.flatten(0, 2) for z_HGBCd in tokens[:3])
        y_XCd, after = update(k_XCd, v_XCd, q_XCd, tokens.coefficients, layers, starts, self.settings)
        return y_XCd.view(tokens.q_HGBCd.shape), after

    def _stack(self, weights: MemoryWeights) -> list[Tensor]:
        """Return the initial W_2 of all components, [H, 1, components Z, d], and each group's W_1, [H, components, d or 1, Z]."""
        every = [component for components in self.groups.values() for component in components]
        hidden = torch.cat([weights.memories[component][1] for component in every], dim=1).unsqueeze(1)
        return [
            hidden,
            *(torch.stack([weights.memories[component][0] for component in components], dim=1) for components in self.groups.values()),
        ]
