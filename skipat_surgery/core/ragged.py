"""Grids that differ by image: what Φ needs to know of a batch that has no one grid.

The patches of each image lie row by row, as many places for all as the largest image needs; the places beyond an image
are padding. All of Φ runs on them as it does on one grid, but for its convolution and the seeds of its clusters.

For the convolution the images are laid out on one grid, as high as the highest and as wide as the widest. That is four
times the cells where one image is 8×32 patches and another 32×8, and on a CPU still two to three times as fast as to
gather the neighbours of each patch. But its size is known only when it runs. A graph, which is made for every batch,
gathers: neighbours and seeds follow from a place and the size of its image by arithmetic alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from .recording import is_recorded


@dataclass(frozen=True)
class Ragged:
    """The grids of B images, of which each has its own.

    Args:
        sizes: (B, 2), rows and columns of each grid.
        length: N, the number of places for the patches of an image.

    Examples:
        >>> grids = Ragged(torch.tensor([[2, 2], [1, 3]]), length=4)
        >>> grids.real
        tensor([[ True,  True,  True,  True],
                [ True,  True,  True, False]])
    """

    sizes: Tensor
    length: int

    def to(self, *args: Any, **kwargs: Any) -> Ragged:
        """On another device, where accelerate brings what it finds among the inputs of a block."""
        return replace(self, sizes=self.sizes.to(*args, **kwargs))

    @property
    def real(self) -> Tensor:
        """(B, N), which places are patches and no padding."""
        return torch.arange(self.length, device=self.sizes.device) < self.sizes.prod(dim=1, keepdim=True)

    def seen(self, attended: Tensor | None, prefix: int = 0, suffix: int = 0) -> Tensor:
        """Which of all tokens count (B, P + N + S): those that are `attended`, but for the padding."""
        real = F.pad(self.real, (prefix, suffix), value=True)
        return real if attended is None else real & attended

    @property
    def gathers(self) -> bool:
        """Whether the neighbours of a patch are gathered, as no size can be read."""
        return is_recorded() or not len(self.sizes)

    def on_one_grid(self, hidden: Tensor) -> Tensor:
        """Patches (B, N, h) on a grid that has room for each image, (B, h, H, W), with zeros around them."""
        sides = self.sizes.amax(dim=0).tolist()
        cells = hidden.new_zeros(math.prod(sides) * len(self.sizes) + 1, hidden.shape[-1])
        # Padding goes into one more row, which is cut off.
        cells = cells.index_copy(0, self._cells(sides, len(cells) - 1), hidden.flatten(0, 1))[:-1]
        return cells.view(-1, *sides, hidden.shape[-1]).movedim(-1, 1)

    def off_one_grid(self, hidden: Tensor) -> Tensor:
        """Undo `on_one_grid`, (B, h, H, W) to (B, h, N), with whatever on padding."""
        cells = self._cells(hidden.shape[-2:], 0)
        return (
            hidden.movedim(1, -1).flatten(0, 2).index_select(0, cells).unflatten(0, (-1, self.length)).transpose(-2, -1)
        )

    def _cells(self, sides: Sequence[int], padding: int) -> Tensor:
        """(B·N,), where each place is on that grid."""
        row, column = self.at()
        first = math.prod(sides) * torch.arange(len(self.sizes), device=self.sizes.device)[:, None]
        return torch.where(self.real, first + row * sides[1] + column, padding).flatten()

    def gathered(self, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The depthwise convolution of patches (B, N, h) by kernels (h, 1, k, l): (B, h, N), the bias on padding."""
        # One more row, of zeros, stands for what lies beyond the edges.
        patches = F.pad(hidden.flatten(0, 1), (0, 0, 0, 1))
        out = bias.to(hidden.dtype)
        kernels = weight.to(hidden.dtype).flatten(1).transpose(-2, -1)
        for place, kernel in zip(self._around(weight.shape[2:]), kernels, strict=True):
            out = torch.addcmul(out, patches[place], kernel)
        return out.transpose(-2, -1)

    def _around(self, sides: tuple[int, ...]) -> Iterator[Tensor]:
        """Of each cell of a kernel, which patch of the batch it meets at each place (B, N); one beyond the last of all
        where it meets none."""
        rows, columns = self.at()
        height, width = self._sides()
        count, real = self.sizes.shape[0] * self.length, self.real
        first = self.length * torch.arange(self.sizes.shape[0], device=self.sizes.device)[:, None]
        for down, right in product(*(range(-(side // 2), side // 2 + 1) for side in sides)):
            row, column = rows + down, columns + right
            inside = real & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            yield torch.where(inside, first + row * width + column, count)

    def seeds(self, side: int) -> tuple[Tensor, Tensor, Tensor]:
        """Every `side`-th patch along each axis.

        Returns:
            (B, M), their places; (B, M), whether an image has so many; (B, N), which of them each patch is, or -1.
        """
        (rows, columns), (height, width) = self.at(), self._sides()
        across = _up(width, side)
        number = torch.arange(self._most_seeds(side), device=self.sizes.device)
        row, column = number // across * side, number % across * side
        there = row < height
        is_seed = self.real & (rows % side == 0) & (columns % side == 0)
        own = torch.where(is_seed, rows // side * across + columns // side, -1)
        return torch.where(there, row * width + column, 0), there, own

    def _most_seeds(self, side: int) -> int:
        """M: what the image with most has, or in a graph, that is made for all, the most that an image can have."""
        if is_recorded():
            return _up(self.length, side)  # of patches in one row
        counts = _up(self.sizes, side).prod(dim=1)
        return int(counts.max()) if len(counts) else 1

    def at(self) -> tuple[Tensor, Tensor]:
        """(B, N), the row and the column of each place."""
        places, width = torch.arange(self.length, device=self.sizes.device), self._sides()[1]
        return places // width, places % width

    def _sides(self) -> tuple[Tensor, Tensor]:
        """(B, 1), the height and the width of each grid."""
        return self.sizes[:, :1], self.sizes[:, 1:]


Layout: TypeAlias = tuple[int, ...] | Ragged  # one grid for all images of a batch, or one for each


def _up(length: Any, side: int) -> Any:
    """The length over a side, rounded up."""
    return (length + side - 1) // side


def places_in(grid: Layout) -> int:
    """The number of places that a layout has for patches."""
    return grid.length if isinstance(grid, Ragged) else math.prod(grid)


def seen_in(grid: Layout, attended: Tensor | None, prefix: int = 0, suffix: int = 0) -> Tensor | None:
    """Which tokens (B, P + N + S) are no padding: neither of the mask, nor of the layout; None where none is."""
    return grid.seen(attended, prefix, suffix) if isinstance(grid, Ragged) else attended


def select(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Entries of one dimension: the same (M,) for all images, or each image's own (B, M), the images first in x."""
    if index.ndim == 1:
        return x.index_select(dim, index)
    shape = [1] * x.ndim
    shape[0], shape[dim] = index.shape
    return torch.take_along_dim(x, index.view(shape), dim)
