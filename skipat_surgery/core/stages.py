"""Stages: where more happens to the tokens of a tower than its blocks do, and runs of skipped blocks end.

Between two stages most towers merge patches: the grid gets half as high and wide, rounded up, and the tokens twice as
wide. A Z from before that fits no block behind it. Others convolve the map, and add what the stage began with. So each
stage is cut by itself, and its first block is never skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .units import Units
from .windows import Windows


@dataclass(frozen=True)
class Stage:
    """Neighbouring blocks whose tokens have one width and lie on one grid.

    Args:
        blocks: Which blocks, counted over all stages.
        width: D of their tokens.
        merged: How many patches of the first stage one of theirs stands for, along each axis.
        fills: Whether a grid that is no whole number of those is filled up, or the rest of it left out.
        units: How the tokens lie where they do not lie row by row.
    """

    blocks: range
    width: int
    merged: int = 1
    fills: bool = True
    units: Units | None = None

    def grid(self, patches: tuple[int, ...]) -> tuple[int, ...]:
        """Its grid, from that of the first stage."""
        # Halved and rounded time after time, a side is what it is divided and rounded at once.
        return merged(patches, self.merged) if self.fills else tuple(length // self.merged for length in patches)


@dataclass(frozen=True)
class Stages:
    """How a family keeps its stages, and what its blocks, which attend within windows, need to be cut.

    Args:
        path: Of the sequence of stages, from the tower.
        takes_z: Slot of the module that is given Z on the map: the MSA gives it window by window.
        first: What is grafted on the first block of a stage: the grid of its tokens becomes known there.
        attended: What is grafted on a block that hands its Z on.
        skipped: What is grafted on a skipped block, in which nothing is laid out in windows.
        windows: From the tower and a block, those within which it attends.
        between: From the tower, the number of a stage, what its last block gave, and what that was given beside X, what
            the next stage begins with.
        residual: Whether to that is added what the stage began with. Then no patches are merged between stages.
        in_windows: Whether all of a block lies in windows, what takes Z as well, so that no map is there to be given.
        merges: Path of a sequence of what makes the maps of all stages, where these do not hold it.
    """

    path: str
    takes_z: str
    first: type
    attended: type
    skipped: type
    windows: Callable[[Any, Any], Windows]
    between: Callable[[Any, int, Tensor, tuple[Any, ...]], Tensor]
    residual: bool = False
    in_windows: bool = False
    merges: str | None = None


def merged(grid: tuple[int, ...], side: int = 2) -> tuple[int, ...]:
    """A grid after so many patches along each axis became one."""
    return tuple((length + side - 1) // side for length in grid)


def allowed_blocks(stages: Iterable[Stage]) -> str:
    """The blocks that can be skipped, as people write them: 1, 3, 5 to 22; none where every stage is one block."""
    inside = [(stage.blocks.start + 1, stage.blocks.stop - 1) for stage in stages if len(stage.blocks) > 1]
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in inside) or "none"
