"""The families of transformers that fold the windows of an image into the batch: backbones of real-time detectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .family import Family
from .folded_windows import FoldedWindows
from .transformers_shapes import SHAPE_D, transformers_family


def _others(tower: Any, windowed: Sequence[int]) -> list[int]:
    """All blocks but these."""
    return [index for index in range(tower.config.num_hidden_layers) if index not in windowed]


FOLDED_FAMILIES: tuple[Family, ...] = (
    transformers_family(
        "RF-DETR's DINOv2",
        "rf_detr",
        ("RfDetrDinov2Backbone",),
        "RfDetrDinov2Layer",
        1,
        **{**SHAPE_D, "embeddings": None},
        folded=FoldedWindows(lambda tower: tower.config.num_windows, "global_attention", within=False),
        global_blocks=lambda tower: _others(tower, tower.config.window_block_indexes),
    ),
    transformers_family(
        "LW-DETR's ViT",
        "lw_detr",
        ("LwDetrViTBackbone",),
        "LwDetrViTLayer",
        0,
        **{**SHAPE_D, "embeddings": None, "norm": "layernorm_before", "final_norm": None},
        folded=FoldedWindows(lambda tower: tower.config.num_windows_side, "window", within=True),
        global_blocks=lambda tower: _others(tower, tower.config.window_block_indices),
    ),
)
