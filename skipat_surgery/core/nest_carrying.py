"""What the blocks of NesTs need on top of `carrying`: all of a block lies in windows, (B, T, N, D), and Z on the map.

NesT calls the windows blocks of the image. They are rows of squares of N patches, and a level, which is a stage, begins
by laying them out and ends by putting them together. Between, no token meets another but in the MSA. So X stays as it
is, and Z alone is put on the map for Φ, and back into windows where it is added to X.

Source: timm, ``nest.TransformerLayer.forward``, whose code this is.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .carrying import box_of, boxed_like, carry
from .grafting import Grafted
from .windows import Windows


class FirstNestLayer(Grafted):
    """The first block of a level: the grid is that of a square image."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().__call__(carry(x.view_as(x), grid_of(x)), *args, **kwargs)  # type: ignore[misc]


class NestLayer(Grafted):
    """A block: X + Z, then X + MLP(LN(X))."""

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self
        z = self.attend(boxed_like(x, block.norm1(x)))
        x = x + block.drop_path1(z)
        return x + block.drop_path2(block.mlp(block.norm2(x)))

    def attend(self, x: Tensor) -> Tensor:
        """Z of what the MSA reads, both in windows."""
        raise NotImplementedError


class TappedNestLayer(NestLayer):
    """An attended block of which Z goes into the box, on the map."""

    def attend(self, x: Tensor) -> Tensor:
        """By the MSA."""
        z = self.attn(x)  # type: ignore[attr-defined]
        box_of(x).z = on_map(z).flatten(1, 2)
        return z


class SkippedNestLayer(NestLayer):
    """A skipped block: what stands in the slot of its MSA is given the map."""

    def attend(self, x: Tensor) -> Tensor:
        """By Φ."""
        z = self.attn(boxed_like(x, on_map(x)))  # type: ignore[attr-defined]
        return windows_of(x).partition(z).view_as(x) if z.ndim == x.ndim else z  # a deleted MSA gives nothing


def grid_of(x: Tensor) -> tuple[int, int]:
    """The grid (H, W) of what lies in windows (B, T, N, D)."""
    side = math.isqrt(x.shape[1] * x.shape[2])
    return side, side


def windows_of(x: Tensor) -> Windows:
    """The windows in which something lies, (B, T, N, D)."""
    return Windows.square(math.isqrt(x.shape[2]))


def on_map(x: Tensor) -> Tensor:
    """Windows (B, T, N, D) as a map (B, H, W, D)."""
    return windows_of(x).tokens(x, grid_of(x)).unflatten(1, grid_of(x))


def pooled(level: Any, x: Tensor) -> Tensor:
    """What the first block of a level is given, (B, T, N, D), from what the last one before it gave."""
    windows = windows_of(x)
    x = level.pool(on_map(x).movedim(-1, 1)).movedim(1, -1)
    return windows.partition(x).view(x.shape[0], *level.pos_embed.shape[1:]) + level.pos_embed
