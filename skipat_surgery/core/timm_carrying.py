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
        given = {name: value for name, value in kwargs.items() if value is not None}  # a reentrant one takes none
        return checkpoint(super().__call__, *args, **given)  # type: ignore[misc]


class TimmTower(Grafted):
    """A tower that leaves checkpointing to its blocks."""

    skipat_family: Family

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        super().set_grad_checkpointing(enable)  # type: ignore[misc]
        for module in _running(self, self.skipat_family):
            module.grad_checkpointing = False
        for block in self.skipat_family.block_list(self):  # type: ignore[arg-type]
            block.skipat_checkpoints = enable  # type: ignore[assignment]


class PosEmbedTower(TimmTower):
    """A tower whose tokens carry, out of ``_pos_embed``, the grid that they had before it."""

    def _pos_embed(self, x: Tensor) -> Any:
        embed: Any = self.patch_embed  # type: ignore[attr-defined]
        height, width = embed.grid_size if embed.flatten else x.shape[1:3]
        out = super()._pos_embed(x)  # type: ignore[misc]
        carry(out[0] if isinstance(out, tuple) else out, (height, width))
        return out


def makes_the_grid(tower: Any, family: Family) -> bool:
    """Whether tokens carry the grid out of a method of the tower."""
    return family.embeddings is None and family.pooled is None and hasattr(tower, "_pos_embed")


def move_checkpointing_into_blocks(tower: Any, family: Family) -> None:
    """Have each block checkpoint itself, if its tower does now. Before any other graft on the blocks."""
    for block in family.block_list(tower):
        graft(block, CheckpointingBlock)
    graft(tower, PosEmbedTower if makes_the_grid(tower, family) else TimmTower)
    tower.__dict__["skipat_family"] = family
    tower.set_grad_checkpointing(_running(tower, family)[0].grad_checkpointing)


def undo_move_checkpointing(tower: Any, family: Family) -> None:
    """Undo it, and every other graft on the tower and its blocks."""
    checkpoints = family.block_list(tower)[0].skipat_checkpoints
    for block in family.block_list(tower):
        ungraft(block)
        block.__dict__.pop("skipat_checkpoints")
    ungraft(tower)
    del tower.__dict__["skipat_family"]
    for module in _running(tower, family):
        module.grad_checkpointing = checkpoints


def _running(tower: Any, family: Family) -> list[Any]:
    """What runs the blocks, and knows whether to checkpoint them: the tower, or its stages."""
    return [tower.get_submodule(path) for path in family.stage_paths(tower)] or [tower]
