"""Delta gradient descent (DGD, Eq. 56-57, 113-121) for the linear layers of any model, under any optimizer.

    optimizer = DeltaGradientDescent(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    loss(model(x)).backward()
    optimizer.step()

Inside nlray the same rule is `rule: dgd` of a level.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlray.nn.delta_linear import delta_linear
from nlray.optimizers.base import require


class DeltaLinear(nn.Linear):
    """An `nn.Linear` with another weight gradient: delta gradient descent's (delta + lambda y / mean(x^2)) x^T, where y = W x.

    The output and the gradients of input and bias are the same as in `nn.Linear`.
    """

    dgd_lambda: float = 1.0
    loss_tokens: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        if x.numel() == 0:
            return F.linear(x, self.weight, self.bias)
        rows = x.reshape(-1, x.shape[-1])
        y = delta_linear(rows, self.weight, dgd_lambda=self.dgd_lambda, loss_tokens=self.loss_tokens).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class DeltaGradientDescent(torch.optim.Optimizer):
    """Delta gradient descent for every `nn.Linear` of a model, with another optimizer to make the steps.

    W <- argmin 1/2 |W x + delta|^2 + |W - W_t|^2 / (2 eta) is W <- W - eta' (delta + W x) x^T (Eq. 57). This is gradient
    descent with another error in the weight gradient of a linear layer. Any optimizer can take this gradient: plain gradient
    descent, momentum or AdamW. Parameter groups and state belong to `base`, so its schedulers and checkpoints work.
    """

    def __init__(self, model: nn.Module, base: torch.optim.Optimizer, *, dgd_lambda: float = 1.0, loss_tokens: int | None = None) -> None:
        """
        Args:
            model: its layers of type `nn.Linear`, at any depth, become `DeltaLinear`, in place; names and values stay.
            base: optimizer of the model's parameters. With `torch.optim.SGD` at `exact_learning_rate` a step on one token is
                Eq. 57 to the letter.
            dgd_lambda: weight of the layer's own output in the error, >= 0; 1 is the paper, 0 plain gradient descent.
            loss_tokens: tokens that the loss is a mean over; None: the rows of a layer's input. Set it where micro-batches
                are accumulated, or the loss leaves tokens out.

        Raises:
            ValueError: a value out of range, or a model without an `nn.Linear`.
        """
        require(dgd_lambda >= 0, f"dgd_lambda is {dgd_lambda}; allowed: 0 or more")
        require(loss_tokens is None or loss_tokens >= 1, f"loss_tokens is {loss_tokens}; allowed: 1 or more, or None")
        # Not subclasses: their forward is their own.
        layers = [m for m in model.modules() if type(m) in (nn.Linear, DeltaLinear)]
        require(len(layers) > 0, f"model: {type(model).__name__} has no nn.Linear")
        super().__init__(base.param_groups, base.defaults)
        self.base = base
        self.param_groups, self.state = base.param_groups, base.state
        for layer in layers:
            layer.__class__ = DeltaLinear
            layer.dgd_lambda, layer.loss_tokens = dgd_lambda, loss_tokens

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Have the base optimizer make its step."""
        return self.base.step(closure)

    def __getstate__(self) -> dict[str, Any]:
        # torch's own leaves out what a subclass adds, in copies too.
        return super().__getstate__() | {"base": self.base}

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load it into the base optimizer."""
        self.base.load_state_dict(state_dict)
        self.param_groups, self.state = self.base.param_groups, self.base.state


def exact_learning_rate(eta: float, squared_norm: float) -> float:
    """Return eta' = eta / (1 + eta |x|^2), the rate at which one step minimises Eq. 56 exactly (Eq. 113-121, Sherman-Morrison).

    Args:
        eta: step size of the proximal term |W - W_t|^2 / (2 eta), > 0.
        squared_norm: |x|^2 of the layer's inputs, >= 0; the width of the input where its root mean square is 1.
    """
    require(eta > 0, f"eta is {eta}; allowed: more than 0")
    return eta / (1.0 + eta * squared_norm)
