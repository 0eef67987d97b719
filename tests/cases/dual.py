"""Of hosts whose stages hold other blocks than Swin's: Florence-2 and DaViT, which attend over channels too, and NesT.

A window is no divisor of any grid of the first two, which take images of any size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import small_models as make
import timm
from torch import nn

from .case import Case, InStages
from .making import SIZES
from .stages import DEPTHS, STAGED

BART_PART: dict[str, Any] = {"layers": 1, "ffn_dim": 48, "attention_heads": 4}
FLORENCE: dict[str, Any] = {
    "depths": DEPTHS,
    "embed_dim": (16, 32),
    "num_heads": (2, 4),
    "num_groups": (2, 4),
    "patch_size": (7, 3),
    "patch_stride": (4, 2),
    "patch_padding": (3, 1),
    "patch_prenorm": (False, True),
    "window_size": 3,
    "mlp_ratio": 1.5,
    "drop_path_rate": 0.1,
    "projection_dim": 32,
    "image_size": 32,
}
BART: dict[str, Any] = {
    "model_type": "bart",
    "d_model": 32,
    "vocab_size": 50,
    "max_position_embeddings": 32,
    **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in BART_PART.items()},
}
FLORENCES: list[Case] = [
    Case(
        name,
        "Florence-2 vision (transformers)",
        build,
        InStages(f"{path}blocks.{{}}.{{}}.spatial_block.window_attn", DEPTHS),
        **STAGED,
        **differs,
    )
    for name, build, path, differs in (
        *(
            (
                f"Florence2VisionBackbone{also}",
                make.of("Florence2VisionBackbone", "Florence2VisionConfig", **FLORENCE),
                "",
                {"others": others, "given": lambda images: {"hidden_states": images}},
            )
            for also, others in (("", ()), (", any size", ((32, 64), (64, 32), (48, 40))))
        ),
        *(
            (
                name,
                make.of(name, "Florence2Config", vision_config=FLORENCE, text_config=BART, image_token_id=9),
                path,
                {"inputs": make.places_for(17)},
            )
            for name, path in (
                ("Florence2Model", "vision_tower."),
                ("Florence2ForConditionalGeneration", "model.vision_tower."),
            )
        ),
    )
]


def davit_cases(family: str, name: str, part: str) -> list[Case]:
    """Cases of one family, in whose blocks a part attends within windows, and the next over channels."""
    settings = {
        "depths": DEPTHS,
        "embed_dims": (16, 32),
        "num_heads": (2, 4),
        "window_size": 3,
        "mlp_ratio": 1.5,
        "drop_path_rate": 0.1,
        "num_classes": 5,
        "pretrained_cfg_overlay": {"input_size": (3, 32, 32)},
    }
    return [
        Case(
            f"timm {family.lower()}{also}",
            f"{family} (timm)",
            lambda: timm.create_model(name, **settings),
            InStages(f"stages.{{}}.blocks.{{}}.{part}.attn", DEPTHS),
            **{**STAGED, **differs},
        )
        for also, differs in (("", {}), (", any size", SIZES))
    ]


@timm.models.register_model
def small_nest(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A NesT of any shape, which timm builds in fixed ones."""
    return timm.models.build_model_with_cfg(timm.models.nest.Nest, "small_nest", pretrained, **kwargs)


def of_nest(name: str, **differs: Any) -> Callable[[], nn.Module]:
    """A NesT of two levels, the first of 4 windows of 4×4 patches."""
    settings = {"embed_dims": (16, 32), "num_heads": (2, 4), "depths": DEPTHS, "num_levels": 2, "img_size": 32}
    return lambda: timm.create_model(name, **{**settings, "mlp_ratio": 1.5, "num_classes": 5, **differs})


TIMM: list[Case] = [
    *davit_cases("DaViT", "davit_tiny", "0"),
    *davit_cases("DaViT with named blocks", "davit_base_fl", "spatial_block"),
    Case(
        "timm nest",
        "NesT (timm)",
        of_nest("small_nest"),
        InStages("levels.{}.transformer_encoder.{}.attn", DEPTHS),
        **STAGED,
    ),
]

CASES: list[Case] = [*FLORENCES, *TIMM]
