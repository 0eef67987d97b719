"""What the surgery must know of a family of models: one `Family` each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .projections import Projections

Grid = tuple[int, int]


def _none(tower: Any) -> int:
    return 0


def _never(tower: Any) -> None:
    return None


@dataclass(frozen=True)
class Family:
    """Where a family keeps what the surgery needs. Paths are relative to the tower, slots to the block.

    A *tower* is the module that owns the blocks. Classes are named by their dotted path, so that nothing is imported
    before a model of that family exists.

    Args:
        name: What users call the family; no two have the same.
        towers: Dotted paths of the classes that own the blocks.
        block: Dotted path of the class of every block.
        blocks: Path of the sequence of blocks.
        norm: Slot of the norm that feeds the attention; None where the attention reads the block's input itself.
        attention: Slot of the MSA.
        returns_tuple: Whether the MSA returns (Z, weights) rather than Z.
        embeddings: Path of the module whose output enters the blocks and whose first argument is the image batch;
            None for timm, where the tower does this itself.
        final_norm: Path of the norm that all tokens pass after the last block; None where there is none.
        width: From the tower, the width D of its tokens.
        num_prefix_tokens: From the tower, the number of tokens before the patches.
        image_to_grid: From the tower's embeddings (for timm: from the tower) and (height, width) of the images, the
            patch grid.
        image_size: From the tower, the configured (channels, height, width).
        projections: From an MSA and the arguments of its forward, what it computes.
        attends: From an MSA, whether `projections` can read it.
        num_suffix_tokens: From the tower, the number of tokens after the patches.
        carriers: Paths of modules between the embeddings and the first block.
        adds_between: Path of an encoder that may add position embeddings between its blocks, as YOLOS' does.
        drop: Further slots of a block that only its MSA uses, set to None where it is skipped.
        refuse: From the tower, a reason not to cut this model and what to do, or None.
    """

    name: str
    towers: tuple[str, ...]
    block: str
    blocks: str
    norm: str | None
    attention: str
    returns_tuple: bool
    embeddings: str | None
    final_norm: str | None
    width: Callable[[Any], int]
    num_prefix_tokens: Callable[[Any], int]
    image_to_grid: Callable[[Any, int, int], Grid]
    image_size: Callable[[Any], tuple[int, int, int]]
    projections: Callable[..., Projections]
    attends: Callable[[Any], bool]
    num_suffix_tokens: Callable[[Any], int] = _none
    carriers: tuple[str, ...] = ()
    adds_between: str | None = None
    drop: tuple[str, ...] = ()
    refuse: Callable[[Any], str | None] = _never

    def block_list(self, tower: nn.Module) -> nn.ModuleList | nn.Sequential:
        """The blocks, in order."""
        return tower.get_submodule(self.blocks)  # type: ignore[return-value]

    def grid(self, tower: nn.Module) -> Grid:
        """(H, W) of the patch grid at the configured image size."""
        _, height, width = self.image_size(tower)
        owner = tower if self.embeddings is None else tower.get_submodule(self.embeddings)
        return self.image_to_grid(owner, height, width)


def pair(value: Any) -> tuple[int, int]:
    """(v, v) of a number, (a, b) of a sequence."""
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))
