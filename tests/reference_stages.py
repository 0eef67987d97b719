"""The paper's equations in stages of blocks that attend within windows, which are shifted in every other block.

Written plainly, and sharing no code with the library: a window is a list of places on the map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def grids_of(depths: tuple[int, ...], grid: tuple[int, ...], halves: bool = True) -> list[tuple[int, ...]]:
    """The grid of each block: from stage to stage it is halved, and rounded up, or stays."""
    found: list[tuple[int, ...]] = []
    for depth in depths:
        found += [grid] * depth
        grid = tuple(side // 2 + side % 2 for side in grid) if halves else grid
    return found


def in_blocks(block: Any) -> bool:
    """Whether hidden states lie in windows (B, T, N, D) all the time, as in NesT."""
    return type(block).__module__.endswith(".nest")


def places(block: Any, grid: tuple[int, ...], made: Tensor | None = None) -> Tensor:
    """(n, w), the place on the map of each place of each window of a block; H·W where one is beyond its edges.

    The map is moved up and to the left by the shift, what leaves it comes in again on the other side, and then windows
    that fit no more are filled up at the bottom and on the right. transformers fills up first. The windows of NesT are
    squares of as many places as what an MSA made of them has.
    """
    height, width = grid
    table = torch.arange(height * width).view(grid)
    if in_blocks(block):
        assert made is not None
        side = next(side for side in range(1, made.shape[2] + 1) if side * side == made.shape[2])
        return torch.stack([part.flatten() for rows in table.split(side) for part in rows.split(side, dim=1)])
    if not hasattr(block, "window_size"):  # Florence-2's, which gives its MSA the map, and takes the map from it
        return table.flatten()[None]
    (high, wide), (down, right) = _pair(block.window_size), _pair(getattr(block, "shift_size", 0))
    filling = (0, -width % wide, 0, -height % high)
    table = F.pad(table, filling, value=height * width) if _fills_first(block) else table
    table = torch.cat([table[down:], table[:down]])
    table = torch.cat([table[:, right:], table[:, :right]], dim=1)
    table = table if _fills_first(block) else F.pad(table, filling, value=height * width)
    return torch.stack([part.flatten() for rows in table.split(high) for part in rows.split(wide, dim=1)])


def _fills_first(block: Any) -> bool:
    return type(block).__module__.startswith("transformers.")


def _pair(value: Any) -> tuple[int, int]:
    return tuple(map(int, value)) if isinstance(value, (tuple, list)) else (int(value),) * 2  # type: ignore


def tokens(made: Tensor, places: Tensor, grid: tuple[int, ...]) -> Tensor:
    """What an MSA is given or gives, (B·n, w, D) or a map, as tokens (B, H·W, D)."""
    by_place = made.reshape(-1, places.numel(), made.shape[-1])
    out = made.new_zeros(by_place.shape[0], grid[0] * grid[1] + 1, made.shape[-1])
    return out.index_copy(1, places.flatten(), by_place)[:, :-1]


def like(z: Tensor, made: Tensor, places: Tensor) -> Tensor:
    """Tokens (B, H·W, D) laid out as an MSA gives them, with zeros beyond the edges of the grid."""
    return F.pad(z, (0, 0, 0, 1))[:, places].reshape(made.shape)
