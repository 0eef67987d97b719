"""Φ's depthwise convolution, with a backward that wide kernels can afford on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution that keeps the size of its input.

    Args:
        channels: Number of channels h; each has a kernel of its own.
        kernel_size: Side of the kernel, odd.

    Example:
        >>> DepthwiseConv2d(4, kernel_size=5)(torch.randn(2, 4, 3, 7)).shape
        torch.Size([2, 4, 3, 7])
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, input: Tensor) -> Tensor:
        if self.kernel_size[0] > 3 and input.dtype == torch.bfloat16 and _trains_on_cpu(input):
            return _FloatBackward.apply(input, self.weight, self.bias)
        return super().forward(input)


class _FloatBackward(torch.autograd.Function):
    """The same convolution, whose backward runs in float32.

    For bfloat16 oneDNN has a fast backward of 3×3 kernels only; on wider ones it takes two to four times as long as in
    float32, and a workspace of k² times the input.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(
            input, weight.to(input.dtype), bias.to(input.dtype), padding=weight.shape[-1] // 2, groups=len(weight)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        input, weight, bias = ctx.saved_tensors
        middle, groups = weight.shape[-1] // 2, len(weight)
        found = torch.ops.aten.convolution_backward(
            gradients[0].float(), input.float(), weight.float(), [groups],
            [1, 1], [middle, middle], [1, 1], False, [0, 0], groups, [True, True, True],
        )  # fmt: skip
        return tuple(gradient.to(given.dtype) for gradient, given in zip(found, (input, weight, bias), strict=True))


def _trains_on_cpu(input: Tensor) -> bool:
    return input.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()
