"""Of hosts whose blocks lie in stages, and attend within windows, which are shifted in every other block.

A window is no divisor of any grid here, where the host can do with that. The contract skips blocks of both stages, and
runs end with the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import small_models as make
import timm
from packaging.version import Version
from torch import nn

from .case import Case, InStages
from .making import SIZES

DEPTHS = (4, 2)
SHAPE: dict[str, Any] = {"embed_dim": 16, "depths": DEPTHS, "num_heads": (2, 4), "mlp_ratio": 1.5}
STAGED: dict[str, Any] = {"prefix": 0, "patch": 4}
ANY_SIZE: dict[str, Any] = {"strict_img_size": False}
# Before, Swin v2 took no windows but whole ones.
FILLED: dict[str, Any] = {"window_size": 3 if Version(timm.__version__) >= Version("1.0.31") else 4}


def of_timm(name: str, **differs: Any) -> Callable[[], nn.Module]:
    """A model of two stages of timm."""
    settings = {**SHAPE, "img_size": 32, "patch_size": 4, "window_size": 3, "num_classes": 5, **differs}
    return lambda: timm.create_model(name, **settings)


def timm_cases(family: str, name: str, path: str, settings: dict[str, Any], **variants: dict[str, Any]) -> list[Case]:
    """Cases of one family: as timm builds it, for any size, and what else differs by name."""
    every = {"": {}, ", any size": ANY_SIZE, **variants}
    return [
        Case(
            f"timm {family.lower()}{also}",
            f"{family} (timm)",
            of_timm(name, **{**settings, **differs}),
            InStages(f"{path}.{{}}.blocks.{{}}.attn", DEPTHS),
            **{**STAGED, **(SIZES if differs is ANY_SIZE else {})},
        )
        for also, differs in every.items()
    ]


TIMM: list[Case] = [
    # The second stage is one window, which is not shifted.
    *timm_cases("Swin", "swin_tiny_patch4_window7_224", "layers", {}, **{", whole windows": {"window_size": 4}}),
    *timm_cases("Swin v2", "swinv2_tiny_window8_256", "layers", FILLED),
    *timm_cases("Swin v2 CR", "swinv2_cr_tiny_224", "stages", FILLED),
]

SWIN: dict[str, Any] = {**SHAPE, "image_size": 32, "patch_size": 4, "window_size": 3, "num_labels": 5}
BACKBONE: dict[str, Any] = {"out_features": ["stage1", "stage2"]}


# Where a window is no smaller than a map, hosts shrink it for good. Bare models stand for their families where graphs
# are made: torch.export does not come to an end of some stock ones with sides that change.
OTHERS: dict[str, Any] = {"Model": (), "ForMaskedImageModeling": ((48, 48),)}


def of_transformers(model: str, config: str, **differs: Any) -> Callable[[], nn.Module]:
    """A model of two stages of transformers."""
    return make.of(model, config, **{**SWIN, **differs})


def transformers_cases(family: str, prefix: str, base: str, *variants: tuple[str, dict[str, Any]]) -> list[Case]:
    """Cases of one family: the bare model, and by the end of their names others that hold it at a path."""
    every = (("Model", "", {}), *((name, f"{base}.", differs) for name, differs in variants))
    return [
        Case(
            f"{prefix}{name}",
            f"{family} (transformers)",
            of_transformers(f"{prefix}{name}", f"{prefix}Config", **differs),
            InStages(f"{path}encoder.layers.{{}}.blocks.{{}}.attention", DEPTHS),
            **STAGED,
            others=OTHERS.get(name, ((32, 64), (64, 32), (48, 40))),
        )
        for name, path, differs in every
    ]


TRANSFORMERS: list[Case] = [
    *transformers_cases(
        "Swin",
        "Swin",
        "swin",
        ("ForImageClassification", {}),
        ("ForMaskedImageModeling", {"encoder_stride": 8}),
        ("Backbone", BACKBONE),
    ),
    *transformers_cases("Swin v2", "Swinv2", "swinv2", ("ForImageClassification", {})),
    Case(
        "Swinv2Backbone",
        "Swin v2 backbone (transformers)",
        of_transformers("Swinv2Backbone", "Swinv2Config", **BACKBONE),
        InStages("encoder.layers.{}.blocks.{}.attention", DEPTHS),
        **STAGED,
    ),
    *transformers_cases("Donut's Swin", "DonutSwin", "donut", ("ForImageClassification", {})),
    *transformers_cases("MaskFormer's Swin", "MaskFormerSwin", "model", ("Backbone", BACKBONE)),
]

# One patch is one pixel, and the host takes no images but of whole windows.
SWIN2SR: dict[str, Any] = {"image_size": 8, "patch_size": 1, "window_size": 4, "num_heads": (2, 2), "upscale": 1}
HEADS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Model", "", {}),
    ("ForImageSuperResolution", "swin2sr.", {"upsampler": "", "resi_connection": "3conv"}),
    ("ForImageSuperResolution, ×2", "swin2sr.", {"upsampler": "pixelshuffledirect", "upscale": 2}),
)
RESTORATION: list[Case] = [
    Case(
        f"Swin2SR{head}",
        "Swin2SR (transformers)",
        of_transformers(f"Swin2SR{head.partition(',')[0]}", "Swin2SRConfig", **SWIN2SR | differs),
        InStages(
            f"{'' if head == 'Model' else 'swin2sr.'}encoder.stages.{{}}.layers.{{}}.attention", DEPTHS, halves=False
        ),
        prefix=0,
        size=(8, 8),
        patch=1,
        others=((8, 16), (16, 8), (12, 8)),
    )
    for head, path, differs in HEADS
]

CASES: list[Case] = [*TRANSFORMERS, *RESTORATION, *TIMM]
