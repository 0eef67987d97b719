"""Hosts that pack the patches of all images into one sequence: what of their inputs gives the grid of each image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .packed import Packed
from .packed_windows import in_windows

# Qwen2-VL has no size of its own: that of most images of other models, at its patches of 14 pixels 224.
PATCHES_ALONG = 16


def qwen_size(tower: Any) -> tuple[int, int, int]:
    """(C, H, W) of a square image of as many patches as the position embeddings are learned on."""
    side = int(tower.config.num_position_embeddings**0.5) * tower.config.patch_size
    return tower.config.in_channels, side, side


def qwen2_size(tower: Any) -> tuple[int, int, int]:
    """(C, H, W) of a square image, for a tower without position embeddings of its own."""
    config = tower.config
    side = PATCHES_ALONG * config.patch_size
    return config.num_channels if hasattr(config, "num_channels") else config.in_channels, side, side


def qwen_grid(tower: Any, height: int, width: int) -> tuple[int, int]:
    """The grid of an image, which is of whole blocks of patches that are merged later."""
    side, merge = tower.config.patch_size, tower.config.spatial_merge_size
    return height // (side * merge) * merge, width // (side * merge) * merge


def qwen_inputs(tower: Any, images: Tensor) -> dict[str, Tensor]:
    """What Qwen takes, of images (B, C, H, W) of one size: patches (T, C·t·p·p) block by block, and their grids."""
    config = tower.config
    (rows, columns), side, merge = qwen_grid(tower, *images.shape[-2:]), config.patch_size, config.spatial_merge_size
    cut = images[..., : rows * side, : columns * side].unflatten(3, (-1, merge, side)).unflatten(2, (-1, merge, side))
    # (B, C, rows, m, p, columns, m, p), of which each patch is shown for all its frames
    cells = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)[..., None, :, :]
    cells = cells.expand(*cells.shape[:6], getattr(config, "temporal_patch_size", 1), side, side)
    sizes = torch.tensor([[1, rows, columns]], device=images.device).repeat(len(images), 1)
    return {"hidden_states": cells.flatten(0, 4).flatten(1), "grid_thw": sizes}


def glm_size(tower: Any) -> tuple[int, int, int]:
    """(C, H, W) of the images that the position embeddings are learned on."""
    return tower.config.in_channels, tower.config.image_size, tower.config.image_size


def glm_image_grids(tower: Any, pixel_values: Tensor, grid_thw: Tensor | None = None, **others: Any) -> Packed:
    """`qwen_grids` of a tower that calls its patches by another name."""
    return qwen_grids(tower, pixel_values, grid_thw)


def pixtral_grids(tower: Any, pixel_values: Tensor, image_sizes: Any = None, **others: Any) -> Packed:
    """The grids of images (B, C, H, W) of Pixtral, of which each fills so many pixels, (B, 2), from its upper left.

    Raises:
        ValueError: There is no size for each image, or one that is larger than all images.
    """
    whole = torch.tensor([pixel_values.shape[-2:]] * len(pixel_values), device=pixel_values.device)
    sizes = whole if image_sizes is None else torch.as_tensor(image_sizes, device=pixel_values.device)
    if sizes.shape != whole.shape or (image_sizes is not None and bool((sizes > whole).any())):
        raise ValueError(
            f"Φ needs image_sizes (images, 2), the height and width of each image, up to {whole.tolist()[:1]}, but got "
            f"{sizes.tolist()}; the processor gives them"
        )
    return Packed.of(sizes // tower.patch_size)


def qwen_grids(tower: Any, hidden_states: Tensor, grid_thw: Tensor | None = None, **others: Any) -> Packed:
    """The grids of patches (T, patch) of Qwen's towers, of each frame of each image or video.

    Raises:
        ValueError: As `frames_of`.
    """
    return Packed.of(frames_of(tower, hidden_states, grid_thw), tower.config.spatial_merge_size)


def windowed_grids(tower: Any, hidden_states: Tensor, grid_thw: Tensor | None = None, **others: Any) -> Packed:
    """`qwen_grids` of a tower that packs them window by window."""
    config = tower.config
    merge, sizes = config.spatial_merge_size, frames_of(tower, hidden_states, grid_thw)
    return in_windows(sizes, merge, config.window_size // merge // config.patch_size * merge)


def frames_of(tower: Any, hidden_states: Tensor, grid_thw: Tensor | None) -> Tensor:
    """(frames, 2), rows and columns of each frame of the images or videos of Qwen's towers.

    Raises:
        ValueError: They are not given, or not of so many patches, or not of whole blocks that are merged.
    """
    merge = tower.config.spatial_merge_size
    if grid_thw is None or grid_thw.ndim != 2 or grid_thw.shape[1] != 3:
        given = None if grid_thw is None else tuple(grid_thw.shape)
        raise ValueError(
            f"Φ needs grid_thw (images, 3), the frames, rows and columns of each image or video, but got {given}; the "
            "processor gives it as image_grid_thw"
        )
    sizes = grid_thw[:, 1:].to(hidden_states.device).repeat_interleave(grid_thw[:, 0].to(hidden_states.device), dim=0)
    patches = int(sizes.prod(dim=1).sum())
    if patches != hidden_states.shape[0] or bool((sizes % merge).any()):
        raise ValueError(
            f"grid_thw {grid_thw.tolist()} makes {patches} patches, but {hidden_states.shape[0]} were given, or a side "
            f"is no multiple of {merge}, by which patches are merged; take both from one call of the processor"
        )
    return sizes
