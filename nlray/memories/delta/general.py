"""Matrix memories that do not collapse: one matrix per component, all components' rows stacked in one layer.

The derivation is in README.md beside this file ('The general form'). All components have the key as their input, so one triangular
system per chunk serves them all. The interface is that of nlray/memories/scan.py: ChunkedMemory.
"""

import torch
from torch import Tensor

from nlray.memories.layer import Layer, answer_at_start, close, read, renewed, rows_of, write
from nlray.memories.problems import component_problems
from nlray.memories.scan import GATE_COMPONENTS, MEMORY_NOISE, ChunkedMemory, ComponentTensor, MemoryProblem, MemoryWeights, Tokens
from nlray.nn.layers import constant, eye_noise


class MatrixMemory(ChunkedMemory):
    """Every phase and rule of a matrix memory (Eq. 64, 65, 76-88).

    The state is [B, H, R, d]: the rows R of all components, the main one last, as changes since the initial memories (retain: init) or as
    they are (retain: zero); with momentum as many rows again.
    """

    def component_tensors(self, component: str) -> dict[str, ComponentTensor]:
        """Return the initial matrix: near the identity, of a gate a row of zeros."""
        heads, width = self.model.heads, self.model.head_dim
        if component in GATE_COMPONENTS:
            return {"": ComponentTensor((heads, width), constant(0.0))}
        return {"": ComponentTensor((heads, width, width), eye_noise(MEMORY_NOISE))}

    def problems(self) -> list[MemoryProblem]:
        return component_problems(self.model, self.component_values())

    def _initial_fast_weights(self, batch_size: int, weights: MemoryWeights) -> Tensor:
        rows_HRd = self._stack(weights)
        if self.titans.retain == "init":
            rows_HRd = torch.zeros_like(rows_HRd)
        if self.titans.momentum:
            rows_HRd = torch.cat([rows_HRd, torch.zeros_like(rows_HRd)], dim=1)
        return rows_HRd.expand(batch_size, *rows_HRd.shape).clone()

    def _layers(self, weights: MemoryWeights, fast_weights: Tensor) -> Layer:
        # Departs from Eq. 77, 82, 88 with retain "init": alpha acts on the change since the initial memory, not on the whole memory.
        anchor = self._stack(weights).unsqueeze(1) if self.titans.retain == "init" else None
        rows_HGBRd = fast_weights.transpose(0, 1).unsqueeze(1)
        change, momentum = rows_HGBRd.chunk(2, dim=-2) if self.titans.momentum else (rows_HGBRd, None)
        return Layer(anchor, change, momentum)

    def _fast_weights(self, layers: Layer) -> Tensor:
        parts = [layers.change_HGBVK] if layers.momentum_HGBVK is None else [layers.change_HGBVK, layers.momentum_HGBVK]
        return torch.cat(parts, dim=-2).squeeze(1).transpose(0, 1)

    def _renewed(self, starts: Layer, layers: Layer, components: tuple[str, ...]) -> Layer:
        every = self.titans.components
        return renewed(starts, layers, [self._rows(component) for component in every], [component in components for component in every], -2)

    def _project(self, starts: Layer, x_HGBCd: Tensor) -> dict[str, Tensor]:
        components = self.titans.components[:-1]
        answers = answer_at_start(rows_of(starts, slice(0, -self.model.head_dim)), x_HGBCd)
        return dict(zip(components, answers.split([self._rows(component) for component in components], dim=-1), strict=True))

    def _update(self, layers: Layer, starts: Layer, tokens: Tokens) -> tuple[Tensor, Layer]:
        k_HGBCd, v_HGBCd, q_HGBCd, coefficients = tokens
        if self.titans.phase == "self_modifying":
            target = answer_at_start(starts, v_HGBCd)
        else:
            # Departs from Eq. 81-82: a gate is one number per head, the mean of what a d x d memory answers; its value is the mean of v.
            mean = v_HGBCd.mean(-1, keepdim=True)
            target = torch.cat([mean if component in GATE_COMPONENTS else v_HGBCd for component in self.titans.components], dim=-1)
        if self.titans.objective == "l2":
            target = target - answer_at_start(starts, k_HGBCd)
        w_HGBCR = write(layers, k_HGBCd, target, coefficients, forgets=self.titans.forgets)
        main = slice(-self.model.head_dim, None)
        # Departs from Eq. 90 with read "token": Eq. 90 reads at the chunk's start, so that a token never sees its own chunk.
        if self.titans.read == "token":
            y_HGBCd = read(rows_of(layers, main), q_HGBCd, k_HGBCd, w_HGBCR[..., main], coefficients)
        else:
            y_HGBCd = answer_at_start(rows_of(starts, main), q_HGBCd)
        return y_HGBCd, close(layers, k_HGBCd, w_HGBCR, coefficients)

    def _rows(self, component: str) -> int:
        return 1 if component in GATE_COMPONENTS else self.model.head_dim

    def _stack(self, weights: MemoryWeights) -> Tensor:
        """Return the initial memories' rows in the order of the components, [H, R, d]."""
        initial = {component: layers[0] for component, layers in weights.memories.items()}
        return torch.cat(
            [
                initial[component].unsqueeze(1) if component in GATE_COMPONENTS else initial[component]
                for component in self.titans.components
            ],
            dim=1,
        )
