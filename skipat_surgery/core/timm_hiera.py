"""What the surgery must know of timm's Hiera and HieraDet, the first MSA of whose stages merges patches by itself."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from .family import Grid, pair
from .projections import Projection, Projections
from .stages import Stage
from .units import Units


def pooled(tower: Any) -> list[Stage]:
    """The stages, of those blocks that are there: timm may be told to leave the last ones out."""
    found: list[Stage] = []
    side, times = pair(tower.q_stride)[0], 0
    for start, stop in pairwise([0, *(end + 1 for end in tower.stage_ends)]):
        blocks = range(start, min(stop, len(tower.blocks)))
        if blocks:
            first = tower.blocks[start]
            times += _pools(first)
            units = Units(side, len(tower.unroll.schedule) - times) if hasattr(tower, "unroll") else None
            found.append(Stage(blocks, first.dim_out, side**times, fills=False, units=units))
    return found


def _pools(block: Any) -> bool:
    """Whether the MSA of a block makes the map smaller, of HieraDet or of Hiera."""
    return block.q_stride is not None if hasattr(block, "q_stride") else block.attn.q_stride > 1


def strided(tower: Any, height: int, width: int) -> Grid:
    """The grid of patches that overlap, or of timm's own patch embeddings."""
    embed = tower.patch_embed
    if hasattr(embed, "dynamic_feat_size"):
        return tuple(embed.dynamic_feat_size((height, width)))
    proj = embed.proj
    sides = zip((height, width), proj.kernel_size, proj.stride, proj.padding, strict=True)
    return tuple((length + 2 * padding - kernel) // stride + 1 for length, kernel, stride, padding in sides)


def pretrained_size(tower: Any) -> tuple[int, int, int]:
    """The images that timm's weights are for, of as many channels as HieraDet takes."""
    return (_channels(tower), *pair(tower.pretrained_cfg["input_size"][1:]))


def fixed_size(tower: Any) -> tuple[int, ...]:
    """The one size of image that Hiera takes."""
    sides = zip(tower.tokens_spatial_shape, tower.patch_stride, strict=True)
    return (_channels(tower), *(length * stride for length, stride in sides))


def _channels(tower: Any) -> int:
    return next(module for module in tower.patch_embed.modules() if isinstance(module, nn.Conv2d)).in_channels


def refuse_units(tower: Any) -> str | None:
    """Why a Hiera cannot be cut."""
    if tower.patch_drop_rate:
        return "its patch dropout takes units out in training, so there is no grid; create it with patch_drop_rate=0"
    if len(tower.q_stride) != 2:
        return "it takes videos, whose axes come after the channels; use one of images"
    return None


def hiera_projections(attention: Any, x: Tensor) -> Projections:
    """Of an MSA that pools no queries, and what it is given."""
    query, key, value = Projection.thirds(attention.qkv)
    num_heads = attention.heads if hasattr(attention, "heads") else attention.num_heads
    return Projections(
        num_heads=num_heads,
        num_key_heads=num_heads,
        num_value_heads=num_heads,
        scale=attention.scale,
        query=query,
        key=key,
        value=value,
        output=lambda context, asking: attention.proj(context),
        dropout=0.0,
    )
