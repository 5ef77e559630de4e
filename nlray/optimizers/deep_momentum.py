"""Deep momentum (DMGD, Eq. 50): the momentum is an MLP, trained online on the gradients that it then answers.

    DeepMomentum(matrices, lr=0.02, objective="l2", hidden=32)

Letters here: R rows and D columns of a weight [R, D], H hidden width of its memory.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from nlray.config.checks import Range, Rate
from nlray.optimizers.base import TINY, GradientMemory, GradientOptimizer, memory, require, require_share


class DeepMomentum(GradientOptimizer):
    """theta <- theta_0 + decay (theta - theta_0) - inner_lr grad L(m_theta; u), W <- W + lr m_theta(u) (Eq. 50).

    The memory of a weight [R, D] is m(u) = W_out tanh(W_in u) / sqrt(H), without biases or residual, so that m(-u) = -m(u).
    The rows of the gradient are its samples u, shared by all rows of the weight, and scaled to a mean squared norm of 1:
    how far the memory moves does not depend on the gradient's size. A vector would be a single sample, so
    matrices only. W_in starts as fixed noise that depends on the shape and `seed` alone, W_out at zero.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float = 0.02,
        weight_decay: float = 0.0,
        decay: float = 0.9,
        inner_lr: Rate = 0.5,
        objective: Literal["dot", "l2"] = "l2",
        hidden: Annotated[int, Range(1, 2**16)] = 32,
        seed: int = 0,
        update_rms: Rate | None = 0.2,
    ) -> None:
        """
        Args:
            decay: alpha, of what the memory has learned, 0 to below 1.
            inner_lr: eta of the memory, > 0; up to about 1 the L2 regression is stable.
            objective: mean over the rows of <m(u), u> (`dot`) or 1/2 |m(u) + u|^2 (`l2`).
            hidden: H, >= 1; a weight's memory holds 2 H D values.
            seed: of the memory's initial weights.
            params, lr, weight_decay, update_rms: see `GradientOptimizer`. Without update_rms an update is of the size of the
                memory's answer, at most about 1 a row, whatever the gradient's size.

        Raises:
            ValueError: a value out of range, or a parameter that is no matrix.
        """
        require_share("decay", decay)
        require(inner_lr > 0, f"inner_lr is {inner_lr}; allowed: more than 0")
        require(objective in ("dot", "l2"), f"objective is {objective!r}; allowed: dot, l2")
        require(hidden >= 1, f"hidden is {hidden}; allowed: 1 or more")
        super().__init__(
            params,
            lr=lr,
            weight_decay=weight_decay,
            update_rms=update_rms,
            decay=decay,
            inner_lr=inner_lr,
            objective=objective,
            hidden=hidden,
            seed=seed,
        )

    @classmethod
    def takes_only_matrices(cls, options: Mapping[str, Any]) -> bool:
        return True

    @classmethod
    def gradient_memories(cls, shapes: Sequence[tuple[int, ...]], options: Mapping[str, Any]) -> list[GradientMemory]:
        return [
            GradientMemory(
                name="memory",
                key="rows u of gradient g",
                value="-u",
                objective={"dot": "<m(u), u> (Eq. 50)", "l2": "1/2 |m(u) + u|^2 (Eq. 50)"}[options["objective"]],
                rule=f"MLP of width {options['hidden']}, gradient descent, decay {options['decay']:g}",
                size=sum(2 * options["hidden"] * shape[-1] for shape in shapes),
            )
        ]

    def _updates(self, gradients: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]) -> list[Tensor]:
        return [self._update(g, state, group) for g, state in zip(gradients, states, strict=True)]

    def _update(self, gradient_RD: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        hidden, (rows, columns) = group["hidden"], gradient_RD.shape
        initial_HD = _initial_weights(hidden, columns, group["seed"], gradient_RD.dtype, gradient_RD.device)
        # Departs from Eq. 50: the decay leads to the memory's initial weights, not to zero; with W_in at zero it would answer
        # nothing. The state is the change since then, which decays as printed.
        (change_HD,) = memory([state], "w_in", [initial_HD])
        (w_out_DH,) = memory([state], "w_out", [initial_HD.t().contiguous()])
        keys_RD = gradient_RD * (rows**0.5 / torch.linalg.vector_norm(gradient_RD).clamp_min(TINY))
        grad_in_HD, grad_out_DH = inner_gradients(keys_RD, initial_HD + change_HD, w_out_DH, objective=group["objective"])
        change_HD.mul_(group["decay"]).sub_(grad_in_HD, alpha=group["inner_lr"])
        w_out_DH.mul_(group["decay"]).sub_(grad_out_DH, alpha=group["inner_lr"])
        return _features(keys_RD, initial_HD + change_HD) @ w_out_DH.t()


def inner_gradients(keys_RD: Tensor, w_in_HD: Tensor, w_out_DH: Tensor, *, objective: Literal["dot", "l2"]) -> tuple[Tensor, Tensor]:
    """Return the gradients of the memory's objective by W_in, [H, D], and W_out, [D, H], in closed form.

    Departs from Eq. 50: the value is minus the key, not 1, in both objectives; a target of ones has no direction of descent.

    Args:
        keys_RD: the samples u, [R, D]; the objective is the mean over them.
        w_in_HD: [H, D].
        w_out_DH: [D, H].
        objective: <m(u), u>, or 1/2 |m(u) + u|^2.
    """
    rows, hidden = keys_RD.shape[0], w_in_HD.shape[0]
    z_RH = _features(keys_RD, w_in_HD)
    error_RD = keys_RD if objective == "dot" else torch.addmm(keys_RD, z_RH, w_out_DH.t())
    # z = tanh(a) / sqrt(H), so dz/da = (1 - H z^2) / sqrt(H).
    delta_RH = (error_RD @ w_out_DH) * (1.0 - hidden * z_RH.square())
    return delta_RH.t() @ keys_RD / (rows * hidden**0.5), error_RD.t() @ z_RH / rows


def _features(keys_RD: Tensor, w_in_HD: Tensor) -> Tensor:
    """Return tanh(W_in u) / sqrt(H) for each row, [R, H]; its norm is at most 1."""
    return (keys_RD @ w_in_HD.t()).tanh_() * w_in_HD.shape[0] ** -0.5


@functools.lru_cache(maxsize=64)
def _initial_weights(hidden: int, columns: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return W_in's initial values, [H, D], normal with standard deviation 1, drawn on the CPU; never to be modified."""
    return torch.randn(hidden, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(device, dtype)
