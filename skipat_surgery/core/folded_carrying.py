"""What towers need on top of `carrying` that fold the windows of an image into the batch.

Around the MSA of a global block the host joins them, and parts them again. A global block that hands its Z on has both
steps moved into its MSA, and one that is skipped has neither: the host is told that it attends within windows.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .carrying import first_argument, images_of
from .family import Family
from .grafting import Grafted, graft

_GLOBAL = "skipat_global"  # of a block, that it attended globally before


class JoiningAttention(Grafted):
    """The MSA of a global block that hands its Z on: takes and gives windows (B·s², N, D)."""

    skipat_windows: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = first_argument(args, kwargs)
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        out = super().forward(x.reshape(-1, self.skipat_windows * x.shape[1], x.shape[2]), *args[1:], **others)  # type: ignore[misc]
        z, *rest = out if isinstance(out, tuple) else (out,)
        return (z.reshape(x.shape), *rest) if isinstance(out, tuple) else z.reshape(x.shape)


class WindowGrid:
    """A hook on a tower: its encoder is given the grid of a window."""

    def __init__(self, family: Family) -> None:
        self.family = family

    def __call__(self, tower: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        grid = self.family.grid_of(tower, images_of(args, kwargs).shape[1:])
        return args, {**kwargs, "skipat_grid": self.family.grid_in_blocks(tower, grid)}


def bring_window_grid(tower: nn.Module, family: Family) -> None:
    """Put the hook on a tower."""
    tower.register_forward_pre_hook(WindowGrid(family), with_kwargs=True)


def attends_globally(block: nn.Module, family: Family) -> bool:
    """Whether a block of a family that folds its windows attends over all windows of an image, or did before."""
    return block.__dict__.get(_GLOBAL, False) or joins_itself(block, family)


def joins_itself(block: nn.Module, family: Family) -> bool:
    """Whether the block joins the windows before its MSA, as a global one does where nothing was cut."""
    assert family.folded is not None
    return getattr(block, family.folded.flag) != family.folded.within


def keep_windows_apart(block: nn.Module, family: Family) -> None:
    """Have a block leave its windows as they are."""
    assert family.folded is not None
    if attends_globally(block, family):
        block.__dict__[_GLOBAL] = True
        setattr(block, family.folded.flag, family.folded.within)


def join_in_attention(block: nn.Module, family: Family, tower: nn.Module) -> None:
    """Have the MSA of a global block join the windows. Before any other graft on the MSA."""
    assert family.folded is not None
    if attends_globally(block, family):
        attention = block.get_submodule(family.attention)
        graft(attention, JoiningAttention)
        attention.__dict__["skipat_windows"] = family.folded.side(tower) ** 2
        keep_windows_apart(block, family)


def undo_keep_windows_apart(block: nn.Module, family: Family) -> None:
    """Undo either; what is grafted on the MSA is taken off with all other grafts."""
    assert family.folded is not None
    if block.__dict__.pop(_GLOBAL, False):
        setattr(block, family.folded.flag, not family.folded.within)
    block.get_submodule(family.attention).__dict__.pop("skipat_windows", None)
