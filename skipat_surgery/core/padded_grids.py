"""Hosts that pad each image to a common number of patches: what of their inputs gives the grid of each image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ragged import Ragged
from .recording import is_recorded


def patches_of(images: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W) of one size as patches (B, N, side·side·C), row by row, and their grids (B, 2)."""
    rows, columns = images.shape[-2] // side, images.shape[-1] // side
    cells = images[..., : rows * side, : columns * side].unflatten(3, (columns, side)).unflatten(2, (rows, side))
    sizes = torch.tensor([[rows, columns]], device=images.device).repeat(len(images), 1)
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2), sizes


def siglip2_size(tower: Any) -> tuple[int, int, int]:
    """(C, H, W) of a square image of as many patches as the position embeddings are learned on."""
    config = tower.config
    side = int(config.num_patches**0.5) * config.patch_size
    return config.num_channels, side, side


def siglip2_inputs(tower: Any, images: Tensor) -> dict[str, Tensor]:
    """What SigLIP 2 takes, of images (B, C, H, W) of one size."""
    patches, sizes = patches_of(images, tower.config.patch_size)
    seen = torch.ones(patches.shape[:2], dtype=torch.int32, device=images.device)
    return {"pixel_values": patches, "spatial_shapes": sizes, "pixel_attention_mask": seen}


def siglip2_grids(owner: Any, pixel_values: Tensor, spatial_shapes: Tensor | None = None, **others: Any) -> Ragged:
    """The grids of images (B, N, patch) of SigLIP 2.

    Raises:
        ValueError: No size is given for each image.
    """
    given = None if spatial_shapes is None else tuple(spatial_shapes.shape)
    if spatial_shapes is None or pixel_values.ndim != 3 or given != (pixel_values.shape[0], 2):
        raise ValueError(
            f"Φ needs patches (B, N, patch) with spatial_shapes (B, 2), the rows and columns of each image, but got "
            f"pixel_values {tuple(pixel_values.shape)} and spatial_shapes {given}; both are what the processor gives"
        )
    return Ragged(spatial_shapes.to(pixel_values.device), pixel_values.shape[1])


def naflex_grids(
    owner: Any, patches: Tensor, patch_coord: Tensor | None = None, patch_valid: Tensor | None = None
) -> Ragged | None:
    """The grids of patches (B, N, …) of timm's NaFlexViT; None of images (B, C, H, W).

    Raises:
        ValueError: The valid patches of an image are not its whole grid, row by row.
    """
    if patch_coord is None:
        return None
    ends = patch_coord + 1 if patch_valid is None else (patch_coord + 1) * patch_valid[..., None]
    grids = Ragged(ends.amax(dim=1).clamp(min=1), patch_coord.shape[1])
    if not is_recorded():
        valid = torch.ones_like(grids.real) if patch_valid is None else patch_valid.bool()
        rows_and_columns = torch.stack(grids.at(), dim=-1)
        if not torch.equal(valid, grids.real) or not torch.equal(patch_coord[valid], rows_and_columns[valid]):
            raise ValueError(
                "Φ needs the whole grid of each image, its valid patches row by row and first; patch_coord and "
                "patch_valid say otherwise: give them as timm's collator does, without patch dropout"
            )
    return grids
