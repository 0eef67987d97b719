"""What the surgery must know of a family of models: one `Family` each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .folded_windows import FoldedWindows
from .projections import Projections
from .ragged import Ragged
from .stages import Stage, Stages
from .torch_projections import torch_attends, torch_projections

Grid = tuple[int, ...]  # (H, W), or (T, H, W) of a video


def _none(tower: Any) -> int:
    return 0


def _never(*args: Any, **kwargs: Any) -> None:
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
        blocks: Path of the sequence of blocks; where there are stages, from a stage, and empty where that is one. With
            ``*`` for a part, of the sequences in all modules there: where each stage has one, and `pooled` says which.
        norm: Slot of the norm that feeds the attention; None where the attention reads the block's input itself.
        attention: Slot of the MSA; with dots, in a part of the block.
        returns_tuple: Whether the MSA returns (Z, weights) rather than Z.
        embeddings: Path of the module whose output enters the blocks and whose first argument is the image batch;
            None where the tower makes the tokens itself, as most of timm do, or takes one size of image.
        final_norm: Path of the norm that all tokens pass after the last block; None where there is none.
        width: From the tower, the width D of its tokens; where there are stages, in the first.
        num_prefix_tokens: From the tower, the number of tokens before the patches.
        image_to_grid: From the tower's embeddings (where it has none: from the tower) and (height, width) of the
            images, or (frames, height, width) of the videos, the patch grid.
        image_size: From the tower, the configured (channels, height, width), or (frames, channels, height, width).
        projections: From an MSA and the arguments of its forward, what it computes; `nn.MultiheadAttention`'s own when
            left out.
        attends: From an MSA, whether `projections` can read it. Where it cannot, no part of the MSA can be kept.
        num_suffix_tokens: From the tower, the number of tokens after the patches.
        carriers: Paths of modules between the embeddings and the first block.
        adds_between: Path of an encoder that may add position embeddings between its blocks, as YOLOS' does.
        blocks_return_tuple: Whether a block returns (X, …) rather than X.
        drop: Further slots of a block that only its MSA uses, set to None where it is skipped.
        checkpoints_calls: Whether the tower checkpoints around the call of its blocks, as timm's do.
        num_late_blocks: From the tower, the number of last blocks that see further tokens, as where queries join the
            patches there. They cannot be skipped.
        input_shape: From the tower, the shape of one input, where it is none of (channels, height, width).
        refuse: From the tower, a reason not to cut this model and what to do, or None.
        refuse_input: From the arguments of the embeddings' forward, a reason why they have no one grid, or None.
        ragged: From the embeddings and the arguments of their forward, the grids of images that differ, or None where
            they have one. It is given the tower and its arguments as well, which must go by the same names.
        global_blocks: From the tower, the blocks that attend to the whole image, where the others attend within windows
            of it; None where all do.
        packs: Whether the tower packs all images into one sequence; `ragged` then reads the tower's arguments alone.
        maps: Whether the tower's hidden states are 2-D maps (B, H, W, D), which a block lays out in windows for its MSA
            where its `window_size` is positive.
        channels_first: Whether those maps are (B, D, H, W) between blocks.
        stages: How the tower keeps its blocks, where it has stages, whose blocks attend within windows.
        pooled: From the tower, its stages, where an MSA at the beginning of one makes the map smaller by itself. Where
            hidden states are no `maps`, their tokens lie in the units that each stage names.
        folded: How the tower keeps each window of an image as an image of its own, where it does.
        inputs: From the tower and images (B, C, H, W), what its forward takes by name, the patches first; where that
            is not the images.
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
    image_to_grid: Callable[..., Grid]
    image_size: Callable[[Any], tuple[int, ...]]
    projections: Callable[..., Projections] = torch_projections
    attends: Callable[[Any], bool] = torch_attends
    num_suffix_tokens: Callable[[Any], int] = _none
    carriers: tuple[str, ...] = ()
    adds_between: str | None = None
    blocks_return_tuple: bool = False
    drop: tuple[str, ...] = ()
    checkpoints_calls: bool = False
    num_late_blocks: Callable[[Any], int] = _none
    input_shape: Callable[[Any], tuple[int, ...]] | None = None
    refuse: Callable[[Any], str | None] = _never
    refuse_input: Callable[..., str | None] = _never
    ragged: Callable[..., Ragged | None] = _never
    global_blocks: Callable[[Any], Sequence[int] | None] = _never
    packs: bool = False
    maps: bool = False
    channels_first: bool = False
    stages: Stages | None = None
    pooled: Callable[[Any], list[Stage]] | None = None
    folded: FoldedWindows | None = None
    inputs: Callable[[Any, Tensor], dict[str, Tensor]] | None = None

    def block_list(self, tower: nn.Module) -> nn.ModuleList | nn.Sequential:
        """The blocks, in order; of all stages in one list, which is not the tower's own."""
        if self.stages is None and "*" not in self.blocks:
            return tower.get_submodule(self.blocks)  # type: ignore[return-value]
        return nn.ModuleList(map(tower.get_submodule, self.block_paths(tower)))

    def has_msa(self, block: nn.Module) -> bool:
        """Whether a block has something in the slot of its MSA."""
        return any(path == self.attention for path, _ in block.named_modules())

    def block_paths(self, tower: nn.Module) -> list[str]:
        """Where the blocks are, from the tower, in order."""
        owners = [self._within(path) for path in self.stage_paths(tower)] or self._sequences(tower)
        return [f"{owner}.{name}" for owner in owners for name, _ in tower.get_submodule(owner).named_children()]

    def _within(self, stage: str) -> str:
        """The path of the blocks of a stage."""
        return f"{stage}.{self.blocks}" if self.blocks else stage

    def _sequences(self, tower: nn.Module) -> list[str]:
        """Where the sequences of blocks are, from a tower whose stages are no `Stages`."""
        owner, several, inner = self.blocks.partition(".*.")
        if not several:
            return [self.blocks]
        return [f"{owner}.{name}.{inner}" for name, _ in tower.get_submodule(owner).named_children()]

    def stage_paths(self, tower: nn.Module) -> list[str]:
        """Where the stages are, from the tower, in order; none where it has no stages."""
        if self.stages is None:
            return []
        return [f"{self.stages.path}.{name}" for name, _ in tower.get_submodule(self.stages.path).named_children()]

    def stage_parts(self, tower: nn.Module, number: int) -> list[str]:
        """Where a stage is, and what makes its map, from the tower."""
        made = [f"{self.stages.merges}.{number}"] if self.stages and self.stages.merges else []
        return [*self.stage_paths(tower)[number : number + 1], *made]

    def stage_list(self, tower: nn.Module) -> list[Stage]:
        """The stages, in order: one of all blocks where the tower has no others."""
        if self.pooled is not None:
            return self.pooled(tower)
        if self.stages is None:
            return [Stage(range(len(self.block_list(tower))), self.width(tower))]
        found: list[Stage] = []
        start, width, merged = 0, self.width(tower), 1
        for path in self.stage_paths(tower):
            stop = start + len(tower.get_submodule(self._within(path)))  # type: ignore[arg-type]
            found.append(Stage(range(start, stop), width * merged, merged))
            start, merged = stop, merged if self.stages.residual else 2 * merged
        return found

    def stage_of(self, tower: nn.Module, index: int) -> Stage:
        """The stage that a block is in."""
        return next(stage for stage in self.stage_list(tower) if index in stage.blocks)

    def skippable(self, tower: nn.Module) -> tuple[int, ...]:
        """The blocks that can be skipped: all but the first of each stage, and those that see further tokens."""
        stop = self.reach(tower)
        return tuple(index for stage in self.stage_list(tower) for index in stage.blocks[1:] if index < stop)

    def reach(self, tower: nn.Module) -> int:
        """The number of first blocks before which no further tokens join."""
        return len(self.block_list(tower)) - self.num_late_blocks(tower)

    def grid_in_blocks(self, tower: nn.Module, grid: Grid) -> Grid:
        """The grid of what the blocks of the first stage see as one image, from that of an image."""
        side = 1 if self.folded is None else self.folded.side(tower)
        return tuple(length // side for length in grid)

    def shape_of_input(self, tower: nn.Module) -> tuple[int, ...]:
        """The shape of one input at the configured size."""
        return (self.input_shape or self.image_size)(tower)

    @property
    def in_units(self) -> bool:
        """Whether tokens lie in units."""
        return self.pooled is not None and not self.maps

    @property
    def takes_ragged(self) -> bool:
        """Whether images may have a grid each."""
        return self.ragged is not _never

    def arguments(self, tower: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What the forward of a tower takes of images or videos: the first argument, and others by name."""
        if self.inputs is None or images.ndim != 4:
            return images, {}
        first, *others = self.inputs(tower, images).items()
        return first[1], dict(others)

    def grid(self, tower: nn.Module) -> Grid:
        """The patch grid at the configured size."""
        return self.grid_of(tower, self.image_size(tower))

    def grid_of(self, tower: nn.Module, shape: Sequence[int]) -> Grid:
        """The patch grid of an image (C, H, W) or a video (T, C, H, W) of this shape."""
        owner = tower if self.embeddings is None else tower.get_submodule(self.embeddings)
        return self.image_to_grid(owner, *extent(shape))


def extent(shape: Sequence[int]) -> tuple[int, ...]:
    """(H, W) of the shape (C, H, W) of an image, (T, H, W) of the shape (T, C, H, W) of a video."""
    return (*shape[:-3], *shape[-2:])


def pair(value: Any) -> tuple[int, int]:
    """(v, v) of a number, (a, b) of a sequence."""
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))
