"""A 2-D map in windows and back, as SAM, VitDet and Swin lay it out for the MSA of most of their blocks.

Where the map is no whole number of windows, those at its lower and right edges are filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Windows:
    """How a map is laid out in windows.

    Args:
        sides: (height, width) of a window.
        shift: How far the map is rolled up and to the left before, as Swin does it in every other block.
        fills_first: Whether it is filled up before it is rolled, as in transformers, or after, as in timm.
    """

    sides: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    fills_first: bool = False

    @classmethod
    def square(cls, side: int) -> Windows:
        """Windows of one side, which are not shifted."""
        return cls((side, side))

    def partition(self, x: Tensor) -> Tensor:
        """A map (B, H, W, D) as its windows (B·n, height, width, D), row by row."""
        height, width = self.sides
        filling = (0, 0, 0, -x.shape[2] % width, 0, -x.shape[1] % height)
        back = (-self.shift[0], -self.shift[1])
        x = F.pad(x, filling) if self.fills_first else x
        x = x.roll(back, dims=(1, 2)) if any(back) else x
        x = x if self.fills_first else F.pad(x, filling)
        windows = x.unflatten(2, (-1, width)).unflatten(1, (-1, height)).transpose(2, 3)
        return windows.reshape(-1, height, width, x.shape[-1])

    def unpartition(self, windows: Tensor, grid: Sequence[int]) -> Tensor:
        """Undo `partition` on a grid (H, W): windows (B·n, height, width, D) to the map (B, H, W, D), without the
        filling."""
        rows, columns = (-(-length // side) for length, side in zip(grid, self.sides, strict=True))
        x = windows.unflatten(0, (-1, rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        x = x if self.fills_first else x[:, : grid[0], : grid[1]]
        x = x.roll(self.shift, dims=(1, 2)) if any(self.shift) else x
        return x[:, : grid[0], : grid[1]]

    def tokens(self, windows: Tensor, grid: Sequence[int]) -> Tensor:
        """Windows (B·n, height, width, D) or (B·n, height·width, D) of a grid (H, W) to the tokens of its map,
        (B, H·W, D)."""
        return self.unpartition(windows.reshape(-1, *self.sides, windows.shape[-1]), grid).flatten(1, 2)
