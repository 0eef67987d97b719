"""What towers that pack all images into one sequence need on top of `carrying`: the grids come from the tower's own
arguments, and go round what it does between its embeddings and its blocks, where it may make new tensors of tokens.

A hook on the tower sees to that. A graft would not do: a tower may be the whole model, which has a class of its own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .carrying import carried, carry
from .family import Family
from .folded_carrying import WindowGrid
from .grafting import Grafted
from .packed import BOUNDS, Packed


class PackedGrids:
    """The hook: an argument that reaches the first block brings the grids of all images.

    Args:
        family: Of the tower.
        has_encoder: Whether an encoder runs the blocks: it is given the grids. Else what keeps the images apart carries
            them.
    """

    def __init__(self, family: Family, has_encoder: bool) -> None:
        self.family, self.has_encoder = family, has_encoder

    def __call__(self, tower: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        grid = self.family.ragged(tower, *args, **kwargs)
        assert isinstance(grid, Packed)
        if self.has_encoder:
            return args, {**kwargs, "skipat_grid": grid}
        given = kwargs.get(BOUNDS)
        bounds = grid.bounds if given is None else given.view_as(given)
        windows = {} if grid.windows is None else window_arguments(grid, tower.config.spatial_merge_size)
        return args, {**kwargs, BOUNDS: carry(bounds, grid), **windows}


def window_arguments(grid: Packed, merge: int) -> dict[str, Any]:
    """What the host takes in the place of the order of windows that it would make itself: the same, which carries the
    grids to a first block that attends within windows."""
    assert grid.windows is not None
    order = Packed.of(grid.sizes, merge).places.flatten()[grid.back]
    return {"window_index": order[:: merge**2] // merge**2, "cu_window_seqlens": carry(grid.windows.bounds, grid)}


class FirstPackedBlock(Grafted):
    """Block 0 of a tower without an encoder: takes the grids over."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        grid, _ = carried(kwargs[BOUNDS], f"the first {type(self).__name__}")
        return super().__call__(carry(x.view_as(x), grid), *args, **kwargs)  # type: ignore[misc]


def bring_grids(tower: nn.Module, family: Family, has_encoder: bool) -> None:
    """Put the hook on a tower."""
    tower.register_forward_pre_hook(PackedGrids(family, has_encoder), with_kwargs=True)


def undo_bring_grids(tower: nn.Module) -> None:
    """Take it off again."""
    for key, hook in list(tower._forward_pre_hooks.items()):
        if isinstance(hook, (PackedGrids, WindowGrid)):
            del tower._forward_pre_hooks[key], tower._forward_pre_hooks_with_kwargs[key]
