"""Of hosts that fold the windows of an image into the batch, and of whole detectors that hold one of them.

The contract skips blocks of both kinds, within windows and global.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import small_models as make
import transformers
from torch import nn

from .case import Case

BACKBONE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "image_size": 32,
    "patch_size": 4,
    "out_indices": [2, 4, 6],
}
RF: dict[str, Any] = {**BACKBONE, "num_windows": 2}  # blocks 2 and 4 are global
LW: dict[str, Any] = {**BACKBONE, "pretrain_image_size": 32, "num_windows": 4, "window_block_indices": [0, 1, 3, 5]}
DETECTOR: dict[str, Any] = {
    "d_model": 16,
    "decoder_ffn_dim": 16,
    "decoder_layers": 1,
    "decoder_n_points": 2,
    "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 2,
    "num_queries": 5,
    "group_detr": 1,
    "num_labels": 3,
}
HEAD: dict[str, dict[str, Any]] = {"LwDetrForObjectDetection": {"projector_scale_factors": [1.0]}}
SIZES: tuple[tuple[int, int], ...] = ((32, 64), (64, 32), (48, 40))


def detector(name: str, config: str, backbone: str, settings: dict[str, Any]) -> Callable[[], nn.Module]:
    """A whole detector of transformers."""
    inside = lambda: getattr(transformers, backbone)(**settings)  # noqa: E731
    return lambda: getattr(transformers, name)(
        getattr(transformers, config)(backbone_config=inside(), **DETECTOR, **HEAD.get(name, {}))
    )


CASES: list[Case] = [
    Case(
        name,
        f"{family} (transformers)",
        build,
        f"{path}encoder.layer.{{}}.attention",
        prefix,
        patch=4,
        folded=2,
        others=SIZES,
    )
    for family, prefix, whole, backbone, config, settings in (
        ("RF-DETR's DINOv2", 1, "RfDetr", "RfDetrDinov2", "RfDetrDinov2Config", RF),
        ("LW-DETR's ViT", 0, "LwDetr", "LwDetrViT", "LwDetrViTConfig", LW),
    )
    for name, path, build in (
        (f"{backbone}Backbone", "", make.of(f"{backbone}Backbone", config, **settings)),
        (
            f"{whole}ForObjectDetection",
            "model.backbone.backbone.",
            detector(f"{whole}ForObjectDetection", f"{whole}Config", config, settings),
        ),
    )
]
