"""A model's vision tower: its blocks, its tokens, and what was cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Images
from .core.config import SkipatConfig
from .core.cutting import records_of
from .core.family import Family, Grid
from .core.finding import UnsupportedModelError, find_tower
from .core.folded_carrying import attends_globally, joins_itself
from .core.folded_windows import JoinedWindows, tokens_of_images
from .core.map_carrying import window_of
from .core.packed import laid_out
from .core.ragged import Layout, Ragged
from .core.stages import Stage
from .core.units import Units
from .core.windowed_phis import is_windowed
from .core.windows import Windows


@dataclass(frozen=True)
class Tower:
    """A model's vision tower, with its family and what was cut, which is nothing for an untouched model."""

    module: nn.Module
    family: Family
    config: SkipatConfig = field(default_factory=SkipatConfig)

    @classmethod
    def of(cls, model: nn.Module) -> Tower:
        """The tower of a model.

        Raises:
            UnsupportedModelError: The model holds none, or several.
        """
        found = records_of(model)
        if len(found) > 1:
            raise UnsupportedModelError(
                f"{type(model).__name__} holds several cut vision transformers: {[path for path, _, _ in found]}. Pass "
                f"one of them, such as model.get_submodule({found[0][0]!r})"
            )
        if found:
            _, module, record = found[0]
            return cls(module, record.family, record.config)
        _, module, family = find_tower(model)
        return cls(module, family)

    @property
    def blocks(self) -> nn.ModuleList | nn.Sequential:
        """The blocks, in order."""
        return self.family.block_list(self.module)

    @property
    def skippable(self) -> tuple[int, ...]:
        """The blocks that can be skipped."""
        return self.family.skippable(self.module)

    @property
    def reach(self) -> int:
        """The number of first blocks before which no further tokens join."""
        return self.family.reach(self.module)

    @property
    def stages(self) -> list[Stage]:
        """The stages, in order: one of all blocks where the tower has no others."""
        return self.family.stage_list(self.module)

    def stage_of(self, index: int) -> Stage:
        """The stage that a block is in."""
        return self.family.stage_of(self.module, index)

    def width_of(self, index: int) -> int:
        """The width D of a block's tokens."""
        return self.stage_of(index).width

    @property
    def skip(self) -> tuple[int, ...]:
        """The skipped blocks."""
        return self.config.skip

    @property
    def first_changed(self) -> int:
        """The first block of a cut model that is not the teacher's: skipped, or with a narrower MLP."""
        return min((*self.skip, *self.config.mlp_widths))

    @property
    def num_special_tokens(self) -> int:
        """The number of tokens of an image that are no patches; `outputs_of` puts all of them before the patches."""
        return self.windows_of_an_image * self.num_special_in_blocks

    @property
    def num_special_in_blocks(self) -> int:
        """The same of what a block sees as one image, which may be a window; `observe` and `z_of` have them first."""
        return self.family.num_prefix_tokens(self.module) + self.family.num_suffix_tokens(self.module)

    @property
    def windows_of_an_image(self) -> int:
        """How many of what a block sees as images are one image: windows, where they are folded into the batch."""
        return 1 if self.family.folded is None else self.family.folded.side(self.module) ** 2

    def arguments(self, images: Images) -> tuple[Tensor, dict[str, Tensor]]:
        """What the tower's forward takes of images (B, C, H, W), videos (B, T, C, H, W) or patches: the first argument,
        and others by name.

        Raises:
            ValueError: The tower takes no patches.
        """
        if isinstance(images, Tensor):
            return self.family.arguments(self.module, images)
        if not self.family.takes_ragged:
            raise ValueError(
                f"{self.family.name} takes images of one size, (B, C, H, W), but the batch has "
                f"{sorted(images.others)}, which give a grid to each image"
            )
        return images.pixels, dict(images.others)

    def run(self, images: Images, model: Callable[..., Any] | None = None) -> Any:
        """Run the tower, or a model that takes the same, on images, videos or patches."""
        first, others = self.arguments(images)
        return (self.module if model is None else model)(first, **others)

    def grid(self, images: Tensor) -> Grid:
        """The patch grid of these images (B, C, H, W) or videos (B, T, C, H, W)."""
        return self.family.grid_of(self.module, images.shape[1:])

    def layout(self, images: Images) -> Layout:
        """The patch grid of images or videos, or of patches that of each image."""
        return self.ragged(images) or self.grid(images)  # type: ignore[arg-type]

    def layout_in(self, index: int, layout: Layout) -> Layout:
        """What `layout` gave, as it is in a block, which may be in a later stage."""
        if isinstance(layout, Ragged):
            return layout
        return self.family.grid_in_blocks(self.module, self.stage_of(index).grid(layout))

    def pooling(self, index: int) -> int:
        """How many patches along each axis the MSA of a block makes one of; after the last block, none."""
        stages = self.stages if self.family.pooled else []
        sides = (after.merged // before.merged for before, after in pairwise(stages) if after.blocks.start == index)
        return next(sides, 1)

    def patches_in(self, index: int) -> int:
        """The number of patches of an image of the configured size, in a block."""
        return math.prod(self.stage_of(index).grid(self.family.grid(self.module)))

    def ragged(self, images: Images) -> Ragged | None:
        """The grids of patches; None of images or videos."""
        if isinstance(images, Tensor) and not self.family.packs:
            return None
        first, others = self.arguments(images)
        return self.family.ragged(self.module, first, **others)

    def real(self, images: Images) -> Tensor | None:
        """Which patches (B, N) are no padding; None where none is."""
        grid = self.ragged(images)
        return None if grid is None else grid.real

    def windows_in(self, index: int) -> Windows | JoinedWindows | Units | None:
        """How the tokens inside a block's MSA lie in windows, or units; None where they lie row by row."""
        if self.family.folded:
            joined = attends_globally(self.blocks[index], self.family)
            return JoinedWindows(self.windows_of_an_image) if joined else None
        if self.family.stages:
            return self.family.stages.windows(self.module, self.blocks[index])
        if self.family.in_units:
            return self.stage_of(index).units
        side = window_of(self.blocks[index]) // self.pooling(index) if self.family.maps else 0
        return Windows.square(side) if side else None

    def gives_windows(self, index: int) -> bool:
        """Whether a block's MSA gives Z in windows, which the block takes back to the map."""
        return index not in self.skip and is_windowed(self.family, self.blocks[index])

    def z_tokens(self, index: int, z: Tensor, grid: Layout | None) -> Tensor:
        """Z as `z_slot` shows it, as tokens (B, N, D), the patches last."""
        if self.family.folded:
            in_windows = index not in self.skip and joins_itself(self.blocks[index], self.family)
        elif self.family.stages:
            in_windows = self.family.stages.in_windows
        elif self.family.in_units:
            in_windows = index not in self.skip
        else:
            in_windows = self.gives_windows(index)
        return self.inner_tokens(z, grid, self.windows_in(index) if in_windows else None)

    def inner_tokens(
        self, x: Tensor, grid: Layout | None, windows: Windows | JoinedWindows | Units | None = None
    ) -> Tensor:
        """What there is inside a block, in windows or not, as tokens (B, N, D), the patches last."""
        if windows is not None:
            assert isinstance(grid, tuple) or isinstance(windows, JoinedWindows)
            return windows.tokens(x, grid or ())  # type: ignore[arg-type]
        return self.patches_last(laid_out(grid, x))

    def state_tokens(self, x: Tensor, grid: Layout | None) -> Tensor:
        """Hidden states between blocks as tokens (B, N, D), the patches last."""
        return self.inner_tokens(x.movedim(1, -1) if self.family.channels_first and x.ndim == 4 else x, grid)

    def of_images(self, x: Tensor, images: Images, index: int | None = None) -> Tensor:
        """Tokens as a block sees them, the patches last, as those of whole images (B, N, D), row by row; after the last
        block where `index` is left out."""
        folded, stage = self.family.folded, self.stages[-1] if index is None else self.stage_of(index)
        if stage.units:
            return stage.units.tokens(x, stage.grid(self.grid(images)))  # type: ignore[arg-type]
        if folded is None:
            return x
        window = self.family.grid_in_blocks(self.module, self.grid(images))  # type: ignore[arg-type]
        return tokens_of_images(x, folded.side(self.module), window, self.num_special_in_blocks)

    def patches_last(self, tokens: Tensor) -> Tensor:
        """(B, N, D) with the suffix tokens, where the family has any, moved before the patches."""
        suffix = self.family.num_suffix_tokens(self.module)
        if suffix == 0:
            return tokens
        prefix = self.family.num_prefix_tokens(self.module)
        return torch.cat([tokens[:, :prefix], tokens[:, -suffix:], tokens[:, prefix:-suffix]], dim=1)

    def last_module(self) -> nn.Module:
        """What the tokens leave the tower from: the norm after the last block, or that block where there is none."""
        path = self.family.final_norm
        norm = None if path is None else attrgetter(path)(self.module)  # None too where a model is built without
        return self.blocks[-1] if norm is None else norm

    def msa_slot(self, index: int) -> nn.Module:
        """What makes Z in a block: its MSA, or what stands in its place."""
        return self.blocks[index].get_submodule(self.family.attention)

    def z_slot(self, index: int) -> nn.Module:
        """Where Z of a block is seen: what gives it, or where there are stages, what is given it on the map."""
        slot = self.family.stages.takes_z if self.family.stages else self.family.attention
        return self.blocks[index].get_submodule(slot)


def check_pair(model: nn.Module, teacher: nn.Module) -> tuple[Tower, Tower]:
    """The towers of a cut model and its teacher.

    Raises:
        ValueError: The model is not cut, or the teacher is.
    """
    student, original = Tower.of(model), Tower.of(teacher)
    if not student.skip:
        raise ValueError("the model is not cut: call skipat_surgery.apply(model, skip=…) first")
    if original.skip:
        raise ValueError("the teacher is cut; it must be the untouched model")
    return student, original
