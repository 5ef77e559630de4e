"""Multi-scale Momentum Muon (M3, Eq. 75 and Algorithm 1): momenta on several time scales, each read through Newton-Schulz.

M3(matrices, lr=0.02, slow_every=16)                 # a fast and a slow momentum
M3(matrices, lr=0.02, slow_every=[16, 128])          # three time scales
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nlray.backend import Path
from nlray.config.checks import Epsilon, Iterations, Rate
from nlray.optimizers.backend import uses_triton
from nlray.optimizers.base import GradientMemory, GradientOptimizer, memory, require, require_share, total_size
from nlray.optimizers.newton_schulz import newton_schulz_each


class M3(GradientOptimizer):
    """theta <- theta - lr (NS(M1) + sum_k alpha_k NS(M2_k)) / sqrt(V + eps) (Algorithm 1), for matrices.

    The fast momentum M1 and the second moment V take every gradient. The slow momentum M2_k takes the sum of the last f_k
    gradients once in f_k steps. Its Newton-Schulz is computed then, and used from the next step on until it is computed again.

    The state of a matrix is M1, V, and for each k three matrices: the slow momentum, the sum of the gradients since its last
    update, and its Newton-Schulz.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float = 0.02,
        weight_decay: float = 0.0,
        beta1: float = 0.95,
        beta2: float = 0.95,
        beta3: float | Sequence[float] = 0.9,
        alpha: float | Sequence[float] = 0.5,
        slow_every: int | Sequence[int] = 16,
        averages: bool = True,
        newton_schulz_steps: Iterations = 5,
        eps: Epsilon = 1e-8,
        update_rms: Rate | None = 0.2,
    ) -> None:
        """
        Args:
            beta1, beta2, beta3: decay rates of M1, V and the slow momenta, 0 to below 1. With `averages=False` they are the
                weights of new gradients in the sums, > 0.
            alpha: weights of the slow momenta, >= 0.
            slow_every: f, steps between two updates of a slow momentum, >= 1. A list makes one slow momentum per entry; beta3
                and alpha are then one number for all, or a list of the same length.
            averages: True: decayed averages M <- beta M + (1 - beta) g; False: the sums M <- M + beta g, as Algorithm 1 prints them.
            newton_schulz_steps: iterations, >= 1.
            eps: added to V, > 0; it bounds the update of an element whose gradients are nearly zero.
            params, lr, weight_decay, update_rms: see `GradientOptimizer`. update_rms=None is the step as printed, whose size is
                proportional to 1 / |g|.

        Raises:
            ValueError: a value out of range, lists of different lengths, or a parameter that is no matrix.
        """
        scales = len(_as_list(slow_every))
        for name, value in (("beta3", beta3), ("alpha", alpha)):
            count = len(_as_list(value))
            require(count in (1, scales), f"{name} has {count} values; allowed: one, or {scales} as slow_every has")
        for name, value in (("beta1", beta1), ("beta2", beta2), *(("beta3", b) for b in _as_list(beta3))):
            if averages:
                require_share(name, value)
            else:
                require(value > 0, f"{name} is {value}; allowed: more than 0")
        require(all(a >= 0 for a in _as_list(alpha)), f"alpha is {alpha}; allowed: 0 or more")
        require(
            scales >= 1 and all(f >= 1 for f in _as_list(slow_every)), f"slow_every is {slow_every}; allowed: 1 or more, one or several"
        )
        require(newton_schulz_steps >= 1, f"newton_schulz_steps is {newton_schulz_steps}; allowed: 1 or more")
        require(eps > 0, f"eps is {eps}; allowed: more than 0")
        super().__init__(
            params,
            lr=lr,
            weight_decay=weight_decay,
            update_rms=update_rms,
            beta1=beta1,
            beta2=beta2,
            beta3=beta3,
            alpha=alpha,
            slow_every=slow_every,
            averages=averages,
            newton_schulz_steps=newton_schulz_steps,
            eps=eps,
        )

    @classmethod
    def takes_only_matrices(cls, options: Mapping[str, Any]) -> bool:
        return True

    @classmethod
    def gradient_memories(cls, shapes: Sequence[tuple[int, ...]], options: Mapping[str, Any]) -> list[GradientMemory]:
        size = total_size(shapes)
        kind = "decayed average" if options["averages"] else "sum"
        read = "read through Newton-Schulz (Eq. 52)"
        hebbian = "-<m, g> (Eq. 10-13)"
        fast = GradientMemory(
            name="fast_momentum", value="none", objective=hebbian, rule=f"{kind}, beta {options['beta1']:g}; {read}", size=size
        )
        second = GradientMemory(
            name="second_moment", value="g^2", objective="|v - g^2|^2", rule=f"{kind}, beta {options['beta2']:g}", size=size
        )
        slow = [
            GradientMemory(
                name="slow_momentum" if index == 0 else f"slow_momentum_{index + 1}",
                key=f"sum of {every} gradients",
                value="none",
                objective=hebbian,
                rule=f"{kind}, beta {beta3:g}; {read}, kept (Eq. 75)",
                size=3 * size,
                every=every,
            )
            for index, (every, beta3, _) in enumerate(_time_scales(options))
        ]
        return [fast, second, *slow]

    def _updates(self, gradients: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]) -> list[Tensor]:
        if uses_triton(self.kernels, gradients):
            return self._fused_updates(gradients, states, group)
        is_average = group["averages"]
        fast = memory(states, "fast_momentum", gradients)
        squares = memory(states, "second_moment", gradients)
        _accumulate(fast, gradients, group["beta1"], is_average=is_average)
        _accumulate(squares, list(torch._foreach_mul(gradients, gradients)), group["beta2"], is_average=is_average)
        directions = newton_schulz_each(fast, group["newton_schulz_steps"], path="torch")
        for index, (_, _, alpha) in enumerate(_time_scales(group)):
            torch._foreach_add_(directions, memory(states, f"slow_output_{index}", gradients), alpha=alpha)
        roots = torch._foreach_add(squares, group["eps"])
        torch._foreach_sqrt_(roots)
        torch._foreach_div_(directions, roots)
        torch._foreach_neg_(directions)
        for index in range(len(_time_scales(group))):
            torch._foreach_add_(memory(states, f"slow_sum_{index}", gradients), gradients)
        self._close_slow(gradients, states, group, path="torch")
        return directions

    def _fused_updates(self, gradients: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]) -> list[Tensor]:
        """Do as `_updates` with kernels: one pass before Newton-Schulz, and one after it."""
        from nlray.optimizers import triton_steps

        indices = range(len(_time_scales(group)))
        fast, squares = (memory(states, key, gradients) for key in ("fast_momentum", "second_moment"))
        outputs, sums = ([memory(states, f"slow_{key}_{index}", gradients) for index in indices] for key in ("output", "sum"))
        shares = [(beta, 1 - beta) if group["averages"] else (1.0, beta) for beta in (group["beta1"], group["beta2"])]
        triton_steps.m3_momenta_(gradients, fast, squares, sums, fast_shares=shares[0], square_shares=shares[1])
        directions = newton_schulz_each(fast, group["newton_schulz_steps"], path=self.kernels)
        alphas = [alpha for _, _, alpha in _time_scales(group)]
        triton_steps.m3_updates_(directions, squares, outputs, alphas=alphas, eps=group["eps"])
        self._close_slow(gradients, states, group, path=self.kernels)
        return directions

    def _close_slow(self, gradients: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any], *, path: Path) -> None:
        """Count the step; add the sums to the slow momenta that are due, compute their Newton-Schulz, and clear the sums."""
        for state in states:
            state["step"] = state["step"] + 1 if "step" in state else torch.ones(())
        for index, (every, beta3, _) in enumerate(_time_scales(group)):
            memory(states, f"slow_momentum_{index}", gradients)
            due = [state for state in states if int(state["step"]) % every == 0]
            sums, slow = ([state[f"slow_{key}_{index}"] for state in due] for key in ("sum", "momentum"))
            if not due:
                continue
            _accumulate(slow, sums, beta3, is_average=group["averages"])
            for state, output in zip(due, newton_schulz_each(slow, group["newton_schulz_steps"], path=path), strict=True):
                state[f"slow_output_{index}"].copy_(output)
            torch._foreach_zero_(sums)


def _accumulate(memories: list[Tensor], values: list[Tensor], beta: float, *, is_average: bool) -> None:
    """Take values into memories, in place: beta m + (1 - beta) v for averages, m + beta v for sums."""
    # Departs from Eq. 75: Algorithm 1 prints sums, which forget nothing; decayed averages are the default.
    if is_average:
        torch._foreach_mul_(memories, beta)
    torch._foreach_add_(memories, values, alpha=1 - beta if is_average else beta)


def _time_scales(options: Mapping[str, Any]) -> list[tuple[int, float, float]]:
    """Return steps between two updates, beta3 and alpha of each slow momentum."""
    every = _as_list(options["slow_every"])
    beta3, alpha = (v * len(every) if len(v) == 1 else v for v in (_as_list(options["beta3"]), _as_list(options["alpha"])))
    return list(zip(every, beta3, alpha, strict=True))


def _as_list(value: float | Sequence[float]) -> list:
    return list(value) if isinstance(value, Sequence) else [value]
