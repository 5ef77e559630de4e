"""A memory of one's own: a diagonal, d values per head and component, written element by element by gradient descent with decay.

nlray train tiny model.titans.memory=diagonal:Diagonal model.titans.rule=gd model.titans.objective=l2
"""

import torch

from nlray.memories.problems import component_problems
from nlray.memories.scan import GATE_COMPONENTS, ChunkedMemory, ComponentTensor
from nlray.nn.layers import constant, normal


class Diagonal(ChunkedMemory):
    def __init__(self, model, *, std: float = 1.0):
        if model.titans.rule != "gd" or model.titans.momentum:
            raise ValueError(f"model.titans.rule is {model.titans.rule}, model.titans.momentum {model.titans.momentum}; allowed: gd, false")
        super().__init__(model)
        self.std = std

    def component_tensors(self, component):
        # Random, so that k and v differ from the start.
        init = constant(0.0) if component in GATE_COMPONENTS else normal(self.std)
        return {"": ComponentTensor((self.model.heads, self.model.head_dim), init)}

    def problems(self):
        return component_problems(self.model, self.component_values(), rule="gradient descent on a diagonal, with decay")

    # The state is [B, H, components, d], the change since the initial memory (retain: init) or the memory (retain: zero).

    def _initial_fast_weights(self, batch_size, weights):
        first = torch.stack([weights.memories[component][0] for component in self.titans.components], dim=1)
        return (torch.zeros_like(first) if self.titans.retain == "init" else first).expand(batch_size, *first.shape).clone()

    def _layers(self, weights, fast_weights):
        """Return each component's anchor, [H, 1, 1, 1, d], and its change, [H, 1, B, 1, d]."""
        changes = fast_weights.transpose(0, 1)[:, None, :, :, None].unbind(3)
        anchors = [weights.memories[component][0][:, None, None, None] for component in self.titans.components]
        if self.titans.retain == "zero":
            anchors = [torch.zeros_like(anchor) for anchor in anchors]
        return dict(zip(self.titans.components, zip(anchors, changes, strict=True), strict=True))

    def _fast_weights(self, layers):
        return torch.stack([change[:, 0, :, 0] for _, change in layers.values()], dim=2).transpose(0, 1)

    def _renewed(self, starts, layers, components):
        return starts | {component: layers[component] for component in components}

    def _answer(self, component, layers, z):
        anchor, change = layers[component]
        made = (anchor + change) * z
        return made.sum(-1, keepdim=True) if component in GATE_COMPONENTS else made

    def _project(self, starts, x):
        return {component: self._answer(component, starts, x) for component in self.titans.components if component != "mem"}

    def _update(self, layers, starts, tokens):
        k, v, q, coefficients = tokens
        after = {}
        for component, (anchor, change) in layers.items():
            target = v.mean(-1, keepdim=True) if component in GATE_COMPONENTS else v
            if self.titans.phase == "self_modifying":
                target = self._answer(component, starts, v)
            if self.titans.objective == "l2":
                target = target - self._answer(component, starts, k)
            # The component after every token of the chunk: its decayed start and all decayed writes so far, [H, 1, B, C, d].
            changes = coefficients.kept_HGBC1 * change + coefficients.written_HGBCC @ (coefficients.eta_HGBC1 * target * k)
            after[component] = (anchor, changes[..., -1:, :])
        if self.titans.read == "chunk_start":
            return self._answer("mem", starts, q), after
        # The main memory is the last component.
        return (anchor + changes) * q, after
