"""Of hosts whose tokens lie in units, in stages whose first MSA makes the map smaller.

Blocks 0, 1 to 3, and 4 and 5 are stages. In the middle one the map is parted once more; but for the first its blocks
are global, as those of the last, or attend within units. Images are no squares, and of one size.
"""

from __future__ import annotations

from typing import Any

import small_models as make

from .case import Case, InStages

DEPTHS, UNITS = (1, 3, 2), (2, 1, 0)
WITHIN_UNITS = (True, True, True)
COMMON: dict[str, Any] = {"prefix": 0, "size": (16, 32), "patch": 2}
TIMM: dict[str, Any] = {
    "img_size": (16, 32),
    "embed_dim": 8,
    "num_heads": 2,
    "num_classes": 5,
    "stages": DEPTHS,
    "q_pool": 2,
    "mask_unit_size": (4, 4),
    "mask_unit_attn": (True, False, False),
    "patch_kernel": (3, 3),
    "patch_stride": (2, 2),
    "patch_padding": (1, 1),
    "mlp_ratio": 1.5,
}


TRANSFORMERS: dict[str, Any] = {
    "image_size": [16, 32],
    "embed_dim": 8,
    "num_heads": [2, 4, 4],
    "num_labels": 5,
    "depths": list(DEPTHS),
    "num_query_pool": 2,
    "masked_unit_size": [4, 4],
    "masked_unit_attention": [True, False, False],
    "patch_size": [3, 3],
    "patch_stride": [2, 2],
    "patch_padding": [1, 1],
    "mlp_ratio": 1.5,
}
CASES: list[Case] = [
    Case(
        f"{name}{also}",
        "Hiera (transformers)",
        make.of(name, "HieraConfig", **TRANSFORMERS | differs),
        InStages(f"{path}encoder.stages.{{}}.layers.{{}}.attn", DEPTHS, units=UNITS),
        **COMMON,
    )
    for name, also, path, differs in (
        ("HieraModel", "", "", {}),
        ("HieraModel", ", within units", "", {"masked_unit_attention": list(WITHIN_UNITS)}),
        ("HieraForImageClassification", "", "hiera.", {}),
    )
] + [
    Case(
        f"timm hiera{also}",
        "Hiera (timm)",
        make.timm_hiera("hiera_tiny_224", **TIMM | differs),
        InStages(f"{path}blocks.{{}}.attn", DEPTHS, flat=True, units=UNITS),
        **COMMON,
    )
    for also, path, differs in (
        ("", "", {}),
        (", within units", "", {"mask_unit_attn": WITHIN_UNITS, "init_values": 0.5}),
        (", features only", "model.", {"features_only": True, "out_indices": (0, 1, 2)}),
    )
]
