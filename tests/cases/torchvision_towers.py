"""Of torchvision."""

from __future__ import annotations

import small_models as make

from .case import Case
from .making import (
    cases_of,
)

CASES: list[Case] = [
    *cases_of(
        "VisionTransformer (torchvision)",
        "encoder.layers.encoder_layer_{}.self_attention",
        1,
        ("torchvision vit", make.torchvision_vit, ""),
        ("torchvision vit, dropout", lambda: make.torchvision_vit(dropout=0.1, attention_dropout=0.1), ""),
    ),
]
