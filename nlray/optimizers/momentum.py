"""Gradient descent and momentum as associative memories of gradients (Eq. 8-13, 33-34, 37, 46, 48-49, 51-52) and AdaGrad.

One class holds the choices that the paper varies one by one: what is stored (`preconditioner`: the value P), under which
key (`features`: phi), by which rule (`Momentum`: Hebbian, `DeltaMomentum`: delta rule), and how it is read (`output`: sigma).

    Momentum(model.parameters(), lr=0.02)                                           # Eq. 33
    Momentum(matrices, lr=0.02, output="newton_schulz")                             # Eq. 52: Muon without Nesterov
    DeltaMomentum(model.parameters(), lr=1e-3, preconditioner="diagonal")           # Eq. 49
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from nlray.config.checks import Epsilon, Iterations, Rate
from nlray.optimizers.base import GradientMemory, GradientOptimizer, memory, require, require_share, root_mean_square, total_size
from nlray.optimizers.newton_schulz import newton_schulz

_Params = Iterable[Tensor] | Iterable[dict[str, Any]]


class GradientDescent(GradientOptimizer):
    """W <- W - lr g: the layer itself is the memory, of its inputs' surprise (Eq. 8-9); none of gradients is kept."""

    def __init__(self, params: _Params, *, lr: float = 0.1, weight_decay: float = 0.0, update_rms: Rate | None = None) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, update_rms=update_rms)

    @classmethod
    def gradient_memories(cls, shapes: Sequence[tuple[int, ...]], options: Mapping[str, Any]) -> list[GradientMemory]:
        return []

    def _updates(self, gradients: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]) -> list[Tensor]:
        return list(torch._foreach_neg(gradients))


class AdaGrad(GradientOptimizer):
    """W <- W - lr g / (sqrt(S) + eps), S the sum of g^2: the element-wise memory of Eq. 106-111."""

    def __init__(
        self, params: _Params, *, lr: float = 0.01, weight_decay: float = 0.0, eps: Epsilon = 1e-10, update_rms: Rate | None = None
    ) -> None:
        """Take eps > 0, added to the root; for the others see `GradientOptimizer`."""
        require(eps > 0, f"eps is {eps}; allowed: more than 0")
        super().__init__(params, lr=lr, weight_decay=weight_decay, update_rms=update_rms, eps=eps)

    @classmethod
    def gradient_memories(cls, shapes: Sequence[tuple[int, ...]], options: Mapping[str, Any]) -> list[GradientMemory]:
        return [_second_moment("sum of g^2 (Eq. 106-111)", shapes)]

    def _updates(self, gradients: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]) -> list[Tensor]:
        squares = memory(states, "square_sum", gradients)
        torch._foreach_addcmul_(squares, gradients, gradients)
        return _divided_by_root(list(torch._foreach_neg(gradients)), squares, group["eps"])


class Momentum(GradientOptimizer):
    """m <- decay m - P phi(g), W <- W + lr sigma(m): momentum as a memory of gradients (Eq. 33, 46, 51, 52).

    The objective is the dot product <m phi(g)^T, P> with a decay. Its gradient step is the Hebbian rule. Tensors may have any
    shape; output `newton_schulz` takes matrices only.
    """

    def __init__(
        self,
        params: _Params,
        *,
        lr: float = 0.01,
        weight_decay: float = 0.0,
        decay: float = 0.9,
        preconditioner: Literal["none", "diagonal"] = "none",
        preconditioner_decay: float = 0.99,
        features: Literal["identity", "cubic"] = "identity",
        output: Literal["identity", "tanh", "sign", "newton_schulz"] = "identity",
        newton_schulz_steps: Iterations = 5,
        eps: Epsilon = 1e-8,
        update_rms: Rate | None = None,
    ) -> None:
        """
        Args:
            decay: alpha, 0 to 1.
            preconditioner: P; `diagonal` is 1 / (sqrt(S) + eps) for each element, S the decayed sum of g^2.
            preconditioner_decay: decay of S, 0 to 1; 1 never forgets (AdaGrad's).
            features: phi; `cubic` is g + g^3 / mean(g^2): the size of an element counts to the third order, and the scale of the
                tensor does not change.
            output: sigma; `tanh` is applied to m divided by its root mean square, because tanh is the identity for values as small
                as gradients.
            newton_schulz_steps: iterations, >= 1.
            eps: added to the root of S, > 0.
            params, lr, weight_decay, update_rms: see `GradientOptimizer`.

        Raises:
            ValueError: a value out of range, or `newton_schulz` for a parameter that is no matrix.
        """
        require_share("decay", decay, up_to_one=True)
        require_share("preconditioner_decay", preconditioner_decay, up_to_one=True)
        for name, value, allowed in (
            ("preconditioner", preconditioner, _PRECONDITIONERS),
            ("features", features, _FEATURES),
            ("output", output, _OUTPUTS),
        ):
            require(value in allowed, f"{name} is {value!r}; allowed: {', '.join(allowed)}")
        require(newton_schulz_steps >= 1, f"newton_schulz_steps is {newton_schulz_steps}; allowed: 1 or more")
        require(eps > 0, f"eps is {eps}; allowed: more than 0")
        super().__init__(
            params,
            lr=lr,
            weight_decay=weight_decay,
            update_rms=update_rms,
            decay=decay,
            preconditioner=preconditioner,
            preconditioner_decay=preconditioner_decay,
            features=features,
            output=output,
            newton_schulz_steps=newton_schulz_steps,
            eps=eps,
        )

    @classmethod
    def takes_only_matrices(cls, options: Mapping[str, Any]) -> bool:
        return options["output"] == "newton_schulz"

    @classmethod
    def gradient_memories(cls, shapes: Sequence[tuple[int, ...]], options: Mapping[str, Any]) -> list[GradientMemory]:
        value = {"none": "none", "diagonal": "P = 1 / sqrt of the sum of g^2"}[options["preconditioner"]]
        features = {"identity": "gradient g", "cubic": "phi(g) = g + g^3 / mean(g^2) (Eq. 51)"}[options["features"]]
        objective, rule = cls._problem(options)
        read = "" if options["output"] == "identity" else f"; read through {options['output']} (Eq. 52)"
        memories = [
            GradientMemory(name="momentum", key=features, value=value, objective=objective, rule=f"{rule}{read}", size=total_size(shapes))
        ]
        if options["preconditioner"] == "diagonal":
            memories.append(_second_moment(f"decayed sum, {options['preconditioner_decay']:g}", shapes))
        return memories

    @classmethod
    def _problem(cls, options: Mapping[str, Any]) -> tuple[str, str]:
        """Return the objective and the rule of the momentum."""
        objective = "<m, g> (Eq. 34)" if options["preconditioner"] == "none" else "<m g^T, P> (Eq. 46)"
        return objective, f"decayed sum, {options['decay']:g}"

    def _updates(self, gradients: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]) -> list[Tensor]:
        keys = [_FEATURES[group["features"]](g) for g in gradients]
        # The key's own buffer must not be overwritten: it may be the parameter's `.grad`.
        values = list(torch._foreach_mul(keys, 1.0))
        if group["preconditioner"] == "diagonal":
            squares = memory(states, "square_sum", gradients)
            torch._foreach_mul_(squares, group["preconditioner_decay"])
            torch._foreach_addcmul_(squares, gradients, gradients)
            values = _divided_by_root(values, squares, group["eps"])
        memories = memory(states, "momentum", gradients)
        self._write_(memories, keys, values, group["decay"])
        return [_OUTPUTS[group["output"]](m, group["newton_schulz_steps"]) for m in memories]

    def _write_(self, memories: list[Tensor], keys: list[Tensor], values: list[Tensor], decay: float) -> None:
        """Update the memories in place (Eq. 46)."""
        torch._foreach_mul_(memories, decay)
        torch._foreach_sub_(memories, values)


class DeltaMomentum(Momentum):
    """m <- m (decay I - g^T g) - P g: momentum with the delta rule, which removes what m holds under the key g (Eq. 48-49).

    The delta rule is gradient descent on |m g^T - P|^2; `Momentum` descends a dot product. The rows of a matrix gradient,
    [D_out, D_in], are the keys. A vector is one row. A tensor with more dimensions is a matrix of its last dimension's rows.

    Departs from Eq. 49: the factor uses g / |g|. Its eigenvalues then lie between decay - 1 and decay. With g itself the
    size of the gradients would decide how much is removed.
    """

    @classmethod
    def _problem(cls, options: Mapping[str, Any]) -> tuple[str, str]:
        return "|m g^T - P|^2 (Eq. 48)", f"delta rule, decay {options['decay']:g} (Eq. 49)"

    def _write_(self, memories: list[Tensor], keys: list[Tensor], values: list[Tensor], decay: float) -> None:
        for m, key, value in zip(memories, keys, values, strict=True):
            rows_m, rows = _as_rows(m), _as_rows(key)
            rows = rows / (root_mean_square(rows) * max(1, rows.numel()) ** 0.5)
            # The smaller of rows^T rows and m rows^T stands between.
            forgotten = rows_m @ (rows.t() @ rows) if rows.shape[0] > rows.shape[1] else (rows_m @ rows.t()) @ rows
            m.mul_(decay).sub_(forgotten.view_as(m)).sub_(value)


def _as_rows(tensor: Tensor) -> Tensor:
    """Return a tensor as a matrix of its last dimension's rows."""
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim else tensor.reshape(1, 1)


def _second_moment(rule: str, shapes: Sequence[tuple[int, ...]]) -> GradientMemory:
    return GradientMemory(name="second_moment", value="g^2", objective="|v - g^2|^2", rule=rule, size=total_size(shapes))


def _divided_by_root(tensors: list[Tensor], squares: list[Tensor], eps: float) -> list[Tensor]:
    """Divide tensors in place by sqrt(squares) + eps, and return them."""
    roots = torch._foreach_sqrt(squares)
    torch._foreach_add_(roots, eps)
    torch._foreach_div_(tensors, roots)
    return tensors


_PRECONDITIONERS = ("none", "diagonal")
_FEATURES = {"identity": lambda g: g, "cubic": lambda g: g + g * (g / root_mean_square(g)).square()}
_OUTPUTS = {
    "identity": lambda m, steps: m.clone(),
    "tanh": lambda m, steps: (m / root_mean_square(m)).tanh(),
    "sign": lambda m, steps: m.sign(),
    "newton_schulz": newton_schulz,
}
