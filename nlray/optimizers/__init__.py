"""Outer optimizers, their schedules and clipping."""

from nlray.optimizers.clip import clip_factor, clip_gradients_, tensor_norms, total_norm
from nlray.optimizers.level import LevelLearner
from nlray.optimizers.outer import OuterOptimizer, has_decay, is_matrix
from nlray.optimizers.schedules import learning_rate

__all__ = [
    "LevelLearner",
    "OuterOptimizer",
    "clip_factor",
    "clip_gradients_",
    "has_decay",
    "is_matrix",
    "learning_rate",
    "tensor_norms",
    "total_norm",
]
