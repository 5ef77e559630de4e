"""The optimizers of "Nested Learning" (arXiv 2512.24695), their schedules and clipping.

Each class is a `torch.optim.Optimizer` for any model; `OuterOptimizer` is what the runtime steps, by the configuration.

    from nlray.optimizers import M3
    optimizer = M3([p for p in model.parameters() if p.ndim == 2], lr=0.02, slow_every=16)
"""

from nlray.optimizers.base import GradientMemory, GradientOptimizer
from nlray.optimizers.clip import clip_factor, clip_gradients_, tensor_norms, total_norm
from nlray.optimizers.deep_momentum import DeepMomentum
from nlray.optimizers.delta import DeltaGradientDescent, DeltaLinear, exact_learning_rate
from nlray.optimizers.m3 import M3
from nlray.optimizers.momentum import AdaGrad, DeltaMomentum, GradientDescent, Momentum
from nlray.optimizers.newton_schulz import newton_schulz
from nlray.optimizers.outer import OuterOptimizer, has_decay
from nlray.optimizers.registry import check_optimizers, gradient_memories, is_matrix
from nlray.optimizers.schedules import learning_rate
from nlray.optimizers.torch_optimizers import AdamW, Muon

__all__ = [
    "M3",
    "AdaGrad",
    "AdamW",
    "DeepMomentum",
    "DeltaGradientDescent",
    "DeltaLinear",
    "DeltaMomentum",
    "GradientDescent",
    "GradientMemory",
    "GradientOptimizer",
    "Momentum",
    "Muon",
    "OuterOptimizer",
    "check_optimizers",
    "clip_factor",
    "clip_gradients_",
    "exact_learning_rate",
    "gradient_memories",
    "has_decay",
    "is_matrix",
    "learning_rate",
    "newton_schulz",
    "tensor_norms",
    "total_norm",
]
