"""Layers of every model kind: parameters with their initial values, norm, short convolution, MLP.

A module registers each parameter and its `Init` with `ParameterModule.add`. `initialize_` fills one parameter from (seed, name)
alone. So every process can make only the tensors that it owns, with the same bits as in any other process.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlray.nn import norms

NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Init:
    """How a parameter starts: a constant, normal noise, or the identity plus normal noise."""

    kind: Literal["constant", "normal", "eye_noise"]
    values: tuple[float, ...]
    """The constant, or one for each entry of a vector; of noise, its standard deviation alone."""


def constant(*values: float) -> Init:
    """Return the Init of a parameter that is one number everywhere, or of a vector with these entries."""
    return Init("constant", values)


def normal(std: float) -> Init:
    return Init("normal", (std,))


def eye_noise(std: float) -> Init:
    return Init("eye_noise", (std,))


@torch.no_grad()
def initialize_(name: str, tensor: Tensor, init: Init, seed: int) -> None:
    """Fill the parameter `name` in place; the values follow from (seed, name, shape, init) and nothing else.

    Args:
        name: full name of the parameter in the model.
        tensor: any device, float dtype; drawn on the CPU in float32 and converted.
        init: the parameter's entry in `parameter_inits`.
        seed: seed of the run.
    """
    if init.kind == "constant":
        tensor.copy_(torch.tensor(init.values).expand(tensor.shape))
        return
    key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
    values = torch.randn(tensor.shape, generator=generator).mul_(init.values[0])
    if init.kind == "eye_noise":
        values.diagonal(dim1=-2, dim2=-1).add_(1.0)
    tensor.copy_(values)


class ParameterModule(nn.Module):
    """A module whose parameters each come with an Init."""

    def __init__(self) -> None:
        super().__init__()
        self.inits: dict[str, Init] = {}

    def add(self, name: str, *shape: int, init: Init) -> None:
        """Register the parameter `name`, uninitialised."""
        self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.inits[name] = init

    def add_bias(self, name: str, size: int, *, is_there: bool) -> None:
        """Register the bias `name`, zero at the start, or None in its place."""
        if is_there:
            self.add(name, size, init=constant(0.0))
        else:
            self.register_parameter(name, None)


def parameter_inits(model: nn.Module) -> dict[str, Init]:
    """Return the Init of every parameter by its full name, in model order."""
    return {
        f"{prefix}.{name}" if prefix else name: module.inits[name]
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }


def out_std(fan_in: int, num_layers: int) -> float:
    """Return the standard deviation of a matrix that writes to the residual stream of a model of `num_layers` blocks."""
    return 1.0 / math.sqrt(fan_in * 2 * num_layers)


def rms_norm(x: Tensor, weight: Tensor, eps: float = NORM_EPS) -> Tensor:
    """Return x over its root mean square along the last dimension, times weight; computed in float32 at least."""
    return norms.rms_norm(x.to(weight.dtype), weight, eps)


def normalize(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Return RMSNorm of x where there is no bias, else LayerNorm, along the last dimension; computed in float32 at least."""
    if bias is None:
        return rms_norm(x, weight, eps)
    return F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, eps)


class ShortConvolution(ParameterModule):
    """Causal depthwise convolution over time: y_t = sum_i w_i x_{t - W + 1 + i}."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.add("weight", dim, width, init=normal(1.0 / math.sqrt(width)))

    def forward(self, x_BTD: Tensor, tail_BPD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the convolution and the new tail; the tail is the last W - 1 inputs of the earlier piece."""
        x_BSD = torch.cat([tail_BPD.to(x_BTD.dtype), x_BTD], dim=1)
        # As an image of height 1 with the channels last: no transposition, and twice as fast as conv1d on a CPU.
        weight_D11W = self.weight[:, None, None].contiguous(memory_format=torch.channels_last)
        y_BD1T = F.conv2d(x_BSD.mT[:, :, None], weight_D11W, groups=self.weight.shape[0])
        return y_BD1T[:, :, 0].mT, x_BSD[:, x_BTD.shape[1] :]


class GatedMLP(ParameterModule):
    """SwiGLU: y = x + W_out (silu(W_gate norm(x)) * (W_in norm(x)))."""

    def __init__(self, dim: int, hidden: int, num_layers: int) -> None:
        super().__init__()
        self.add("norm", dim, init=constant(1.0))
        self.add("w_gate", hidden, dim, init=normal(dim**-0.5))
        self.add("w_in", hidden, dim, init=normal(dim**-0.5))
        self.add("w_out", dim, hidden, init=normal(out_std(hidden, num_layers)))

    def forward(self, x_BTD: Tensor) -> Tensor:
        xn_BTD = rms_norm(x_BTD, self.norm)
        return x_BTD + F.linear(F.silu(F.linear(xn_BTD, self.w_gate)) * F.linear(xn_BTD, self.w_in), self.w_out)
