"""Folded windows: where hidden states hold each window of an image as an image of its own, (B·s², N, D).

Most blocks of such a tower see no more than that, and a few all windows. Z is defined window by window, so that a Φ
sees each window as an image whose grid is the window's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class FoldedWindows:
    """How a family keeps them.

    Args:
        side: From the tower, the number s of windows along each side of an image.
        flag: The attribute of a block that says how it attends.
        within: Its value where that is within windows.
    """

    side: Callable[[Any], int]
    flag: str
    within: bool


@dataclass(frozen=True)
class JoinedWindows:
    """How the tokens inside the MSA of a global block lie: all windows of an image in one row.

    Args:
        count: s².
    """

    count: int

    def tokens(self, x: Tensor, grid: Sequence[int] = ()) -> Tensor:
        """(B, s²·N, D) to windows (B·s², N, D), whatever their grid."""
        return x.unflatten(1, (self.count, -1)).flatten(0, 1)


def tokens_of_images(x: Tensor, side: int, grid: tuple[int, ...], special: int) -> Tensor:
    """Windows (B·s², N, D) as the tokens of images, (B, s²·N, D): the special ones of all windows, then the patches.

    Args:
        x: Of s × s windows an image.
        side: s.
        grid: Of a window.
        special: How many tokens of each window are no patches, the first.
    """
    windows = x.unflatten(0, (-1, side, side))
    patches = windows[:, :, :, special:].unflatten(3, grid).transpose(2, 3).flatten(1, 4)
    return torch.cat([windows[:, :, :, :special].flatten(1, 3), patches], dim=1) if special else patches
