"""What towers whose hidden states are 2-D maps need on top of `carrying`, where blocks may attend within windows.

Such a block lays its map out in windows between its norm and its MSA, where its `window_size` is positive, and takes
them back to the map after it. Z is defined on the map: the output of the MSA, windowed or global, after that. So a
block that hands its Z on has both steps moved into its MSA, and one that is skipped has neither: the host is told a
negative size. It is not set to 0, by which SAM-HQ knows the blocks whose output its decoder reads. timm's HieraDet is
told so by a flag of its own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .carrying import boxed_like, carry, first_argument
from .family import pair
from .grafting import Grafted, graft
from .windows import Windows

_FLAG = "is_windowed"


class FirstMapBlock(Grafted):
    """Block 0 of a tower of maps, (B, H, W, D): the grid is their shape."""

    skipat_axes = (1, 2)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        grid = tuple(x.shape[axis] // side for axis, side in zip(self.skipat_axes, self.skipat_pools(), strict=True))
        return super().__call__(carry(x.view_as(x), grid), *args, **kwargs)  # type: ignore[misc]

    def skipat_pools(self) -> tuple[int, int]:
        """How many patches along each axis become one in the block."""
        return (1, 1)


class FirstPoolingBlock(FirstMapBlock):
    """The first block of a stage, whose MSA makes the map smaller, but for that of the first stage."""

    def skipat_pools(self) -> tuple[int, int]:
        stride = getattr(self, "query_stride", getattr(self, "q_stride", None))  # of transformers, of timm
        return (1, 1) if stride is None else pair(stride)


class FirstChannelsFirstBlock(FirstMapBlock):
    """Block 0 of a tower of maps (B, D, H, W)."""

    skipat_axes = (2, 3)


class ChannelsFirstBlock(Grafted):
    """A block of VitDet, which makes a new tensor of its input before the norm: that holds what the input did.

    Source: transformers, ``VitDetLayer.forward``, whose code this is, without windows.
    """

    def forward(self, x: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        block: Any = self
        x = boxed_like(x, x.permute(0, 2, 3, 1))
        z, *maps = block.attention(block.norm1(x), output_attentions=output_attentions)
        x = x + block.drop_path(z)
        x = x + block.drop_path(block.mlp(block.norm2(x)))
        x = x.permute(0, 3, 1, 2)
        return (block.residual(x) if block.use_residual_block else x, *maps)


class WindowedAttention(Grafted):
    """The MSA of a windowed block that hands its Z on: takes and gives the map (B, H, W, D).

    What the host does to Z before it takes the windows back, as timm drops paths, it does to the map then.
    """

    skipat_window: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x, windows = first_argument(args, kwargs), Windows.square(self.skipat_window)
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        out = super().forward(windows.partition(x), *args[1:], **others)  # type: ignore[misc]
        z, *rest = out if isinstance(out, tuple) else (out,)
        side = z.shape[1]  # of an MSA that makes its windows smaller, and so the map
        grid = [x.shape[axis] * side // self.skipat_window for axis in (1, 2)]
        z = Windows.square(side).unpartition(z, grid)
        return (z, *rest) if isinstance(out, tuple) else z


def window_of(block: Any) -> int:
    """The side of the windows within which a block attends, or did before it was cut; 0 where it attends globally."""
    return abs(pair(block.window_size)[0])


def attends_in_windows(block: Any) -> bool:
    """Whether what the MSA of a block takes and gives is laid out in windows, as it is where nothing was cut."""
    return getattr(block, _FLAG, pair(block.window_size)[0] > 0)


def move_windows(block: Any, attention: nn.Module) -> None:
    """Have a block give its MSA the map, and the MSA lay it out. Before any other graft on the MSA."""
    if attends_in_windows(block):
        graft(attention, WindowedAttention)
        attention.__dict__["skipat_window"] = window_of(block)
        drop_windows(block)


def drop_windows(block: Any) -> None:
    """Have a block, whose MSA is skipped, leave its map as it is."""
    if hasattr(block, _FLAG):
        block.is_windowed = False
    else:
        block.window_size = -window_of(block)


def undo_windows(block: Any, attention: nn.Module) -> None:
    """Undo either; what is grafted on the MSA is taken off with all other grafts."""
    if hasattr(block, _FLAG):
        block.is_windowed = window_of(block) > 0
    else:
        block.window_size = window_of(block)
    attention.__dict__.pop("skipat_window", None)
