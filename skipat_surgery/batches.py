"""What goes through a model's vision tower: images of one size, or patches with what tells the grid of each image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

PATCHES = ("pixel_values", "hidden_states", "patches")
# What gives the grid of each image, by the name that processors have for it, and the name that towers have.
GRIDS = {"spatial_shapes": "spatial_shapes", "patch_coord": "patch_coord", "image_grid_thw": "grid_thw"}
GRIDS |= {"grid_thw": "grid_thw", "image_sizes": "image_sizes"}
MASKS = ("pixel_attention_mask", "patch_valid")


@dataclass(frozen=True)
class Patches:
    """The patches of a batch of images that have a grid each.

    Args:
        pixels: The patches, laid out as their host wants them: padded to one number, (B, N, …), or packed.
        others: What else the tower takes, by name; first what gives the grid of each image, (B, …).
    """

    pixels: Tensor
    others: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.others.values())))

    @property
    def device(self) -> Any:
        """Where the patches are."""
        return self.pixels.device

    def to(self, *args: Any, **kwargs: Any) -> Patches:
        """The same on another device. Only the pixels take another dtype, as all else are numbers of patches."""
        pixels = self.pixels.to(*args, **kwargs)
        return Patches(pixels, {name: value.to(pixels.device) for name, value in self.others.items()})


Images: TypeAlias = Tensor | Patches


def patches_in(batch: Any) -> Patches | None:
    """The patches of a mapping that says the grid of each image, or of a pair that begins with one; None of any other
    batch."""
    if isinstance(batch, (tuple, list)) and batch:
        return patches_in(batch[0])
    if isinstance(batch, Patches):
        return batch
    if not isinstance(batch, Mapping):
        return None
    if isinstance(batch.get("pixel_values"), Patches):  # beside labels
        return batch["pixel_values"]
    grids = {own: batch[name] for name, own in GRIDS.items() if batch.get(name) is not None}
    pixels = next((batch[name] for name in PATCHES if name in batch), None)
    # Of one size for each image; models of several crops an image have them, too.
    if not grids or not isinstance(pixels, Tensor) or pixels.ndim > 4:
        return None
    return Patches(pixels, {**grids, **{name: batch[name] for name in MASKS if batch.get(name) is not None}})


def values_of(images: Images) -> Tensor:
    """The numbers of the pixels."""
    return images if isinstance(images, Tensor) else images.pixels
