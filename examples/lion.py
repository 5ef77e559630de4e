"""An optimizer of one's own: Lion (arXiv 2302.06675), which follows the sign of a momentum.

nlray train tiny cms.defaults.optimizer.name=lion:Lion cms.defaults.optimizer.lr=1e-3
"""

import torch

from nlray.optimizers import GradientMemory, GradientOptimizer


class Lion(GradientOptimizer):
    def __init__(self, params, *, lr=1e-3, weight_decay=0.0, beta1: float = 0.9, beta2: float = 0.99, update_rms: float | None = None):
        if not 0 <= beta1 < 1:
            raise ValueError(f"beta1 is {beta1}; allowed: 0 to below 1")
        super().__init__(params, lr=lr, weight_decay=weight_decay, update_rms=update_rms, beta1=beta1, beta2=beta2)

    @classmethod
    def gradient_memories(cls, shapes, options):
        size = sum(torch.Size(shape).numel() for shape in shapes)
        rule = f"decayed average, beta {options['beta2']:g}; read by its sign"
        return [GradientMemory(name="momentum", value="none", objective="-<m, g> (Eq. 10-13)", rule=rule, size=size)]

    def _updates(self, gradients, states, group):
        updates = []
        for g, state in zip(gradients, states, strict=True):
            m = state.setdefault("momentum", torch.zeros_like(g))
            updates.append(-torch.lerp(g, m, group["beta1"]).sign())
            m.lerp_(g, 1 - group["beta2"])
        return updates
