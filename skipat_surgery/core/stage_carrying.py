"""What the blocks of timm's Swins need on top of `carrying`: Z lies on the map, whatever the shift of the windows.

Such a block has a method that rolls its map, lays it out in windows, calls the MSA on them and undoes both. What that
method returns is Z, (B, H, W, D), so that the Z of a block whose windows are shifted fits the next, whose are not. A
skipped block has no windows: its method gives Φ the map as it is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .carrying import box_of
from .grafting import Grafted
from .windows import Windows

_RESIZED = "skipat_resized"


class TappedWindows(Grafted):
    """An attended block of which Z goes into the box, once it lies on the map again."""

    def _attn(self, x: Tensor) -> Tensor:
        z = box_of(x).z = super()._attn(x)  # type: ignore[misc]
        return z

    def _shifted_window_attn(self, x: Tensor) -> Tensor:
        z = box_of(x).z = super()._shifted_window_attn(x)  # type: ignore[misc]
        return z


class NoWindows(Grafted):
    """A skipped block: what stands in the slot of its MSA is given the map."""

    attn: nn.Module

    def _attn(self, x: Tensor) -> Tensor:
        return self.attn(x)

    def _shifted_window_attn(self, x: Tensor) -> Tensor:
        return self.attn(x)

    def set_input_size(self, feat_size: Any, window_size: Any, always_partition: bool | None = None) -> None:
        """For images of another size. Φ sees it from the map; the MSA that was taken out is told by `restore`."""
        self.__dict__.setdefault(_RESIZED, []).append((feat_size, window_size, always_partition))


def undo_no_windows(block: Any) -> None:
    """Tell a block that was put back what sizes it was given while it was cut."""
    for sizes in block.__dict__.pop(_RESIZED, ()):
        block.set_input_size(*sizes)


def windows_of(block: Any) -> Windows:
    """The windows of a block."""
    return Windows(tuple(block.window_size), tuple(block.shift_size))
