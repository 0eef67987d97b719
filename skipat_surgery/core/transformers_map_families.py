"""The families of transformers whose hidden states are 2-D maps, of which most blocks attend within windows."""

from __future__ import annotations

from typing import Any

from .family import Family, Grid, pair
from .map_projections import sam3_projections, sam_projections, vitdet_projections
from .stages import Stage
from .transformers_shapes import transformers_family


def _grid(tower: Any, height: int, width: int) -> Grid:
    patch_height, patch_width = pair(tower.config.patch_size)
    return height // patch_height, width // patch_width


def _strided(tower: Any, height: int, width: int) -> Grid:
    """Of patches that overlap, and are filled up at the edges of an image."""
    down, across = pair(tower.config.patch_stride)
    return -(-height // down), -(-width // across)


def _pooled(tower: Any) -> list[Stage]:
    """SAM 2's stages: the first blocks of some of them make the map smaller."""
    config, found, start = tower.config, [], 0
    down, _ = pair(config.query_stride)
    for number, depth in enumerate(config.blocks_per_stage):
        merged = down ** min(number, config.num_query_pool_stages)
        width = config.embed_dim_per_stage[number]
        found.append(Stage(range(start, start + depth), width, merged, fills=False))
        start += depth
    return found


_MAPS: dict[str, Any] = {
    "blocks": "layers",
    "norm": "layer_norm1",
    "attention": "attn",
    "returns_tuple": True,
    "embeddings": None,
    "final_norm": None,
    "image_to_grid": _grid,
    "projections": sam_projections,
    "maps": True,
}

MAP_FAMILIES: tuple[Family, ...] = (
    *(
        transformers_family(f"{name} vision", module, (f"{prefix}{tower}",), f"{prefix}VisionLayer", 0, **_MAPS)
        for name, module, prefix, tower in (
            ("SAM", "sam", "Sam", "VisionEncoder"),
            ("SAM-HQ", "sam_hq", "SamHQ", "VisionEncoder"),
            ("GOT-OCR 2", "got_ocr2", "GotOcr2", "VisionEncoder"),
            ("SLANeXt", "slanext", "SLANeXt", "VisionEncoder"),
            ("PP-FormulaNet", "pp_formulanet", "PPFormulaNet", "VisionModel"),
            ("DeepSeek-OCR 2", "deepseek_ocr2", "DeepseekOcr2Sam", "VisionEncoder"),
            ("Unlimited-OCR", "unlimited_ocr", "UnlimitedOcrSam", "VisionEncoder"),
        )
    ),
    transformers_family(
        "SAM 3 vision",
        "sam3",
        ("Sam3ViTModel",),
        "Sam3ViTLayer",
        0,
        **{**_MAPS, "attention": "attention", "projections": sam3_projections},
    ),
    transformers_family(
        "SAM 2 vision",
        "sam2",
        ("Sam2HieraDetModel",),
        "Sam2MultiScaleBlock",
        0,
        **{**_MAPS, "blocks": "blocks", "returns_tuple": False, "image_to_grid": _strided},
        width=lambda tower: tower.config.embed_dim_per_stage[0],
        pooled=_pooled,
    ),
    transformers_family(
        "VitDet",
        "vitdet",
        ("VitDetModel", "VitDetBackbone"),
        "VitDetLayer",
        0,
        **{
            **_MAPS,
            "blocks": "encoder.layer",
            "norm": "norm1",
            "attention": "attention",
            "projections": vitdet_projections,
        },
        blocks_return_tuple=True,
        channels_first=True,
    ),
)
