"""What timm's towers need on top of `layers`: where the grid comes from, and checkpointing that knows of Z.

timm checkpoints around a block's ``__call__``, where Z is an attribute of x, which a reentrant checkpoint loses. A cut
tower has each block checkpoint itself instead, with Z among the inputs.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from .carrying import carry
from .family import Family
from .grafting import Grafted, graft, ungraft


class CheckpointingBlock(Grafted):
    """A block that checkpoints itself when its tower is told to."""

    skipat_checkpoints: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.skipat_checkpoints:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        # By name, so that transformers does not ask for timm where a checkpoint of its own models carries this file.
        checkpoint = importlib.import_module("timm.models").checkpoint
        return checkpoint(super().__call__, *args, **kwargs)  # type: ignore[misc]


class FirstBlock(Grafted):
    """Block 0 of a tower that takes one size of image and has no ``_pos_embed``: sets the grid out on its way."""

    skipat_patch_embed: tuple[Any]  # in a tuple, as it is no submodule of the block

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        grid = self.skipat_patch_embed[0].grid_size
        return super().__call__(carry(x.view_as(x), grid), *args, **kwargs)  # type: ignore[misc]


class TimmTower(Grafted):
    """A tower that leaves checkpointing to its blocks."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        super().set_grad_checkpointing(enable)  # type: ignore[misc]
        self.grad_checkpointing = False
        for block in self.blocks:  # type: ignore[attr-defined]
            block.skipat_checkpoints = enable


class PosEmbedTower(TimmTower):
    """A tower whose tokens carry, out of ``_pos_embed``, the grid that they had before it."""

    def _pos_embed(self, x: Tensor) -> Any:
        height, width = x.shape[1:3] if x.ndim == 4 else self.patch_embed.grid_size  # type: ignore[attr-defined]
        out = super()._pos_embed(x)  # type: ignore[misc]
        carry(out if isinstance(out, Tensor) else out[0], (height, width))
        return out


def move_checkpointing_into_blocks(tower: Any, family: Family) -> None:
    """Have each block checkpoint itself, if its tower does now. Before any other graft on the blocks."""
    for block in family.block_list(tower):
        graft(block, CheckpointingBlock)
    graft(tower, PosEmbedTower if hasattr(tower, "_pos_embed") else TimmTower)
    tower.set_grad_checkpointing(tower.grad_checkpointing)


def set_out_grid(tower: Any, family: Family) -> None:
    """Let the tokens carry the grid from block 0 on. After every other graft on the blocks."""
    if not isinstance(tower, PosEmbedTower):
        first = family.block_list(tower)[0]
        graft(first, FirstBlock)
        first.__dict__["skipat_patch_embed"] = (tower.patch_embed,)


def undo_timm_layers(tower: Any, family: Family) -> None:
    """Undo both, and every other graft on the tower and its blocks."""
    checkpoints = family.block_list(tower)[0].skipat_checkpoints
    for block in family.block_list(tower):
        ungraft(block)
        block.__dict__.pop("skipat_checkpoints")
        block.__dict__.pop("skipat_patch_embed", None)
    ungraft(tower)
    tower.grad_checkpointing = checkpoints
