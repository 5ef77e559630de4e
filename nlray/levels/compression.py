"""Fewer bytes for the gradients that a worker pushes to a level: bf16 or int8, with error feedback.

    codec = codec_of("int8")
    payload = codec.encode(buffer)                    # uint8
    buffer -= codec.decode(payload, buffer.numel())   # what rounding left is in the next push

What is left of a push stays where the next period is added up, so over the periods no part of a gradient is lost (error
feedback, arXiv 1901.09847). Codes are computed block by block, and blocks never lie in two tensors
(`nlray.levels.flat_buffers`), so they do not depend on the ranks.
"""

from typing import Protocol

import torch
from torch import Tensor

from nlray.levels.flat_buffers import ALIGN


class Codec(Protocol):
    """How a flat float32 buffer travels."""

    bytes_per_value: float

    def encode(self, buffer: Tensor) -> Tensor:
        """Return the code of a buffer [size], uint8, on its device; values that are not finite stay so when decoded."""

    def decode(self, payload: Tensor, size: int) -> Tensor:
        """Return the buffer that a code stands for, [size] float32."""


class Bf16:
    """Every value rounded to bfloat16."""

    bytes_per_value = 2.0

    def encode(self, buffer: Tensor) -> Tensor:
        return buffer.to(torch.bfloat16).view(torch.uint8)

    def decode(self, payload: Tensor, size: int) -> Tensor:
        return payload.view(torch.bfloat16).to(torch.float32)


class Int8:
    """Blocks of 64 values in steps of a 127th of the largest one."""

    bytes_per_value = 1.0 + 4.0 / ALIGN

    def encode(self, buffer: Tensor) -> Tensor:
        blocks = buffer.view(-1, ALIGN)
        scales = blocks.abs().amax(1, keepdim=True) / 127.0
        # A block of zeros, and one that is not finite: its scale is not, and so is all that is decoded of it.
        steps = torch.nan_to_num(blocks / scales, 0.0, 0.0, 0.0).round().to(torch.int8)
        return torch.cat([steps.view(torch.uint8).flatten(), scales.flatten().view(torch.uint8)])

    def decode(self, payload: Tensor, size: int) -> Tensor:
        steps, scales = payload[:size].view(torch.int8), payload[size:].view(torch.float32)
        return (steps.view(-1, ALIGN) * scales[:, None]).flatten()


CODECS: dict[str, type[Codec]] = {"bf16": Bf16, "int8": Int8}


def codec_of(name: str) -> Codec | None:
    """Return the codec of `exchange.compression`; None for `none`."""
    return None if name == "none" else CODECS[name]()


def encode_with_feedback(codec: Codec, buffer: Tensor) -> Tensor:
    """Return the code of a buffer and leave there what the code does not say; nothing of values that are not finite."""
    payload = codec.encode(buffer)
    buffer.sub_(codec.decode(payload, buffer.numel())).nan_to_num_(0.0, 0.0, 0.0)
    return payload
