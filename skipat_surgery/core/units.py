"""Tokens in units, the order in which Hiera keeps them between its blocks.

Where four patches become one in a later stage, the first quarter of the tokens are those of the even rows and columns,
the next those of the even rows and odd columns, and so on: a maximum over quarters makes the map smaller. Each quarter
lies so again for the stage after that; what is left of the map lies row by row. A *unit* is the tokens that have the
same place in all of these parts: a square of the map, within which early blocks attend.

Source: "Hiera: A Hierarchical Vision Transformer without the Bells-and-Whistles", arXiv 2306.00989.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Units:
    """How tokens lie whose map is parted so many more times, `side` patches along each axis becoming one.

    Examples:
        >>> import torch
        >>> places = torch.arange(16).view(1, 16, 1)
        >>> Units(side=2, times=1).put_back(places, (4, 4))[0, :4, 0]
        tensor([ 0,  2,  8, 10])
    """

    side: int
    times: int

    def tokens(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Tokens (B, H·W, D) in units of a grid (H, W), row by row.

        Raises:
            ValueError: There are not as many as the grid has places: a mask took units out.
        """
        self._check(x, grid)
        if not self.times:
            return x
        parts = x.unflatten(1, (*(self.side,) * (self.times * len(grid)), *self._left_of(grid)))
        return parts.permute(self._order(len(grid))).flatten(1, -2)

    def put_back(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Undo `tokens`."""
        if not self.times:
            return x
        axes = ((length, *(self.side,) * self.times) for length in self._left_of(grid))
        order = self._order(len(grid))
        return x.unflatten(1, sum(axes, ())).permute([order.index(axis) for axis in range(len(order))]).flatten(1, -2)

    def _left_of(self, grid: Sequence[int]) -> tuple[int, ...]:
        """The sides of the map that is left when it is parted no more."""
        return tuple(length // self.side**self.times for length in grid)

    def _order(self, axes: int) -> list[int]:
        """Where each axis of the map, and in it what is left first and the first part last, is among those in units."""
        found = [1 + axis + axes * part for axis in range(axes) for part in range(self.times, -1, -1)]
        return [0, *found, 1 + axes * (self.times + 1)]

    def _check(self, x: Tensor, grid: Sequence[int]) -> None:
        height, width = grid
        if x.shape[1] != height * width:
            raise ValueError(
                f"Φ was given {x.shape[1]} tokens of a {height}×{width} patch grid: where a model is cut, no mask may "
                "take units of an image out"
            )
