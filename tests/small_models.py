"""Builders of small models of every host, from configs, with random weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network

import timm
import torch
import transformers
from torch import Tensor, nn

DEPTH = 6
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {**SHAPE, "vocab_size": 50, "max_position_embeddings": 16, "projection_dim": 16, "eos_token_id": 2}
TEXT = {name: value for name, value in TEXT.items() if name not in ("image_size", "patch_size")}


def hf(model: str, config: str, **kwargs: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        settings = getattr(transformers, config)(**{**SHAPE, "num_labels": 5, "encoder_stride": 8, **kwargs})
        return getattr(transformers, model)(settings)

    return build


def two_towers(model: str, config: str, vision: str, text: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        text_config = getattr(transformers, text)(**TEXT)
        vision_config = getattr(transformers, vision)(**SHAPE, projection_dim=16)
        settings = getattr(transformers, config)(
            text_config=text_config.to_dict(), vision_config=vision_config.to_dict(), projection_dim=16
        )
        return getattr(transformers, model)(settings)

    return build


def text(batch: int) -> dict[str, Tensor]:
    return {"input_ids": torch.arange(3, 8).repeat(batch, 1)}


def backbone(name: str, **kwargs: Any) -> Any:
    shape = {**SHAPE, "out_features": ["stage2", "stage3", "stage5", "stage6"], **kwargs}
    return getattr(transformers, name)(**shape)


def depth_anything() -> nn.Module:
    inner = backbone("Dinov2Config", reshape_hidden_states=False)
    return transformers.DepthAnythingForDepthEstimation(
        transformers.DepthAnythingConfig(
            backbone_config=inner,
            patch_size=8,
            reassemble_hidden_size=32,
            neck_hidden_sizes=[8, 8, 8, 8],
            fusion_hidden_size=8,
            head_hidden_size=8,
        )
    )


DPT = {
    "backbone_out_indices": [1, 2, 4, 5],
    "neck_hidden_sizes": [8, 8, 8, 8],
    "fusion_hidden_size": 8,
    "head_hidden_size": 8,
    "is_hybrid": False,
}


def dpt_with_backbone() -> nn.Module:
    inner = backbone("Dinov2Config", reshape_hidden_states=False)
    return transformers.DPTForDepthEstimation(transformers.DPTConfig(**{**SHAPE, **DPT, "backbone_config": inner}))


def upernet() -> nn.Module:
    inner = backbone("Dinov2Config", reshape_hidden_states=True)
    return transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(
            backbone_config=inner, hidden_size=16, pool_scales=[1, 2], use_auxiliary_head=False, num_labels=5
        )
    )


def vitpose() -> nn.Module:
    inner = transformers.VitPoseBackboneConfig(
        **{**SHAPE, "image_size": [32, 16], "patch_size": [8, 8]}, mlp_ratio=2, out_features=["stage6"]
    )
    return transformers.VitPoseForPoseEstimation(
        transformers.VitPoseConfig(backbone_config=inner, num_labels=5, use_simple_decoder=True)
    )


def llava() -> nn.Module:
    text = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=50
    )
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config=text, vision_config=transformers.CLIPVisionConfig(**SHAPE), image_token_index=9
        )
    )


def image_tokens(batch: int) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([1] + [9] * 16 + [4, 5]).repeat(batch, 1)}


def timm_model(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": DEPTH, "num_heads": 4, "mlp_ratio": 1.5}
    settings = {"num_classes": 5, **shape, **kwargs}
    return lambda: timm.create_model(name, **{key: value for key, value in settings.items() if value is not None})


def timm_wrapper(model: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": DEPTH, "num_heads": 4}
        config = transformers.TimmWrapperConfig(
            architecture="vit_tiny_patch16_224", model_args=shape, num_labels=5, do_pooling=True
        )
        return getattr(transformers, model)(config)

    return build
