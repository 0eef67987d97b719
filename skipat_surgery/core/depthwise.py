"""Φ's depthwise convolution, with a backward that wide kernels can afford on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .ragged import Ragged
from .recording import is_recorded


class _Depthwise:
    """Mixin of both convolutions."""

    kernel_size: tuple[int, ...]
    weight: Tensor
    bias: Tensor

    def __init__(self, channels: int, kernel_size: int | tuple[int, ...]) -> None:
        middle = kernel_size // 2 if isinstance(kernel_size, int) else tuple(side // 2 for side in kernel_size)
        super().__init__(channels, channels, kernel_size, padding=middle, groups=channels)  # type: ignore[call-arg]

    def forward(self, input: Tensor, grids: Ragged | None = None) -> Tensor:
        """Over (B, h, H, W), or where grids differ by image over (B, N, h), which gives (B, h, N)."""
        if grids is None:
            return self._on_a_grid(input)
        if grids.gathers:
            return grids.gathered(input, self.weight, self.bias)
        return grids.off_one_grid(self._on_a_grid(grids.on_one_grid(input)))

    def _on_a_grid(self, input: Tensor) -> Tensor:
        slow = len(self.kernel_size) > 2 or max(self.kernel_size) > 3
        if slow and input.dtype == torch.bfloat16 and _trains_on_cpu(input):
            return _FloatBackward.apply(input, self.weight, self.bias)
        return super().forward(input)  # type: ignore[misc]


class DepthwiseConv2d(_Depthwise, nn.Conv2d):  # type: ignore[misc]
    """A depthwise convolution over images (B, h, H, W), which keeps their size.

    Args:
        channels: Number of channels h; each has a kernel of its own.
        kernel_size: Side of the kernel, odd, or its sides.

    Examples:
        >>> DepthwiseConv2d(4, kernel_size=5)(torch.randn(2, 4, 3, 7)).shape
        torch.Size([2, 4, 3, 7])
    """


class DepthwiseConv3d(_Depthwise, nn.Conv3d):  # type: ignore[misc]
    """The same over videos (B, h, T, H, W).

    Examples:
        >>> DepthwiseConv3d(4, kernel_size=(3, 5, 5))(torch.randn(2, 4, 8, 3, 7)).shape
        torch.Size([2, 4, 8, 3, 7])
    """


def depthwise(channels: int, kernel: tuple[int, ...]) -> DepthwiseConv2d | DepthwiseConv3d:
    """The convolution over a grid that has as many axes as the kernel has sides."""
    return DepthwiseConv2d(channels, kernel) if len(kernel) == 2 else DepthwiseConv3d(channels, kernel)


class _FloatBackward(torch.autograd.Function):
    """The same convolution, whose backward runs in float32.

    For bfloat16 oneDNN has a fast backward of 3×3 kernels only; that of wider ones and over videos takes two to four
    times as long as in float32, and a workspace of k² times the input.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.convolution(input, weight.to(input.dtype), bias.to(input.dtype), *_arguments(weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        input, weight, bias = ctx.saved_tensors
        found = torch.ops.aten.convolution_backward(
            gradients[0].float(), input.float(), weight.float(), [len(weight)], *_arguments(weight), [True, True, True]
        )
        return tuple(gradient.to(given.dtype) for gradient, given in zip(found, (input, weight, bias), strict=True))


def _arguments(weight: Tensor) -> tuple[Any, ...]:
    """What torch's own functions take after the bias: stride to groups."""
    sides = weight.shape[2:]
    once, nothing = [1] * len(sides), [0] * len(sides)
    return once, [side // 2 for side in sides], once, False, nothing, len(weight)


def _trains_on_cpu(input: Tensor) -> bool:
    return input.device.type == "cpu" and torch.is_grad_enabled() and not is_recorded()
