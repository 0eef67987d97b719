"""The family of torchvision that can be cut."""

from __future__ import annotations

from typing import Any

from torch import nn

from .family import Family


def _image_size(tower: Any) -> tuple[int, int, int]:
    first = next(module for module in tower.conv_proj.modules() if isinstance(module, nn.Conv2d))
    return (first.in_channels, tower.image_size, tower.image_size)


FAMILIES: tuple[Family, ...] = (
    Family(
        name="VisionTransformer (torchvision)",
        towers=("torchvision.models.vision_transformer.VisionTransformer",),
        block="torchvision.models.vision_transformer.EncoderBlock",
        blocks="encoder.layers",
        norm="ln_1",
        attention="self_attention",
        returns_tuple=True,
        embeddings=None,
        final_norm="encoder.ln",
        width=lambda tower: tower.hidden_dim,
        num_prefix_tokens=lambda tower: 1,
        image_to_grid=lambda tower, height, width: (height // tower.patch_size, width // tower.patch_size),
        image_size=_image_size,
    ),
)
