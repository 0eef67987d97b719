"""The order in which Hiera keeps its tokens. Written plainly, and sharing no code with the library."""

from __future__ import annotations

import torch
from torch import Tensor


def places(grid: tuple[int, ...], times: int) -> Tensor:
    """(1, H·W), the place on the map of each token: it is parted by even and odd rows and columns so many times."""
    return torch.tensor([_parted([list(range(row * grid[1], (row + 1) * grid[1])) for row in range(grid[0])], times)])


def _parted(rows: list[list[int]], times: int) -> list[int]:
    if not times:
        return [place for row in rows for place in row]
    parts = [[row[right::2] for row in rows[down::2]] for down in (0, 1) for right in (0, 1)]
    return [place for part in parts for place in _parted(part, times - 1)]
