"""What the surgery must know of timm's Hiera and HieraDet, the first MSA of whose stages merges patches by itself."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from .family import Grid, pair
from .projections import Projection, Projections
from .stages import Stage


def pooled(tower: Any) -> list[Stage]:
    """The stages, of those blocks that are there: timm may be told to leave the last ones out."""
    found: list[Stage] = []
    side, pools = pair(tower.q_stride)[0], len(tower.q_pool_blocks)
    for number, (start, stop) in enumerate(pairwise([0, *(end + 1 for end in tower.stage_ends)])):
        blocks = range(start, min(stop, len(tower.blocks)))
        if blocks:
            width = tower.blocks[start].dim_out
            found.append(Stage(blocks, width, side ** min(number, pools), fills=False))
    return found


def strided(tower: Any, height: int, width: int) -> Grid:
    """The grid of patches that overlap, or of timm's own patch embeddings."""
    embed = tower.patch_embed
    if hasattr(embed, "dynamic_feat_size"):
        return tuple(embed.dynamic_feat_size((height, width)))
    proj = embed.proj
    sides = zip((height, width), proj.kernel_size, proj.stride, proj.padding, strict=True)
    return tuple((length + 2 * padding - kernel) // stride + 1 for length, kernel, stride, padding in sides)


def pooled_size(tower: Any) -> tuple[int, int, int]:
    """The images that timm's weights are for, of as many channels as this tower takes."""
    first = next(module for module in tower.patch_embed.modules() if isinstance(module, nn.Conv2d))
    return (first.in_channels, *pair(tower.pretrained_cfg["input_size"][1:]))


def hiera_projections(attention: Any, x: Tensor) -> Projections:
    """Of an MSA that pools no queries, and what it is given."""
    query, key, value = Projection.thirds(attention.qkv)
    return Projections(
        num_heads=attention.num_heads,
        num_key_heads=attention.num_heads,
        num_value_heads=attention.num_heads,
        scale=attention.scale,
        query=query,
        key=key,
        value=value,
        output=lambda context, asking: attention.proj(context),
        dropout=0.0,
    )
