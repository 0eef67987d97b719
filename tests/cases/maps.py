"""Of hosts whose hidden states are 2-D maps, of which block 0 attends within windows that do not fill the map.

All others are global, as the contract gives them clusters; tests/test_maps.py skips windowed blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import small_models as make
import torch
from small_models import DEPTH
from torch import Tensor, nn

from .case import Case, InStages
from .making import SIZES, cases_of

GLOBAL = list(range(1, DEPTH))  # the one list that all models are built with, so that a test may change it
WINDOWED = [0]  # the others, by which VitDet knows them
WINDOWS = {"window_size": 3, "global_attn_indexes": GLOBAL}
SAM: dict[str, Any] = {**make.SHAPE, "mlp_dim": 48, "output_channels": 16, "initializer_range": 0.02, **WINDOWS}
_DECODER = {"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
_PROMPTS = {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
_NECK = {"post_conv_in_channels": 16, "post_conv_out_channels": 16}
_FORMULA = {
    "vision_config": {**SAM, **_NECK, "post_conv_mid_channels": 16, "decoder_hidden_size": 32},
    "text_config": {
        "vocab_size": 50,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
    },
}
_QWEN2 = {**make.LLAMA, "model_type": "qwen2", "num_key_value_heads": 2}
_OCR = {"sam_config": {**SAM, "downsample_channels": [16, 32]}, "encoder_config": {**_QWEN2, "model_type": "qwen2"}}
_UNLIMITED = {
    "sam_config": {**SAM, "downsample_channels": [16, 32]},
    "encoder_config": {**make.SHAPE, "num_hidden_layers": 2},
}
_VITDET = {
    "window_size": 3,
    "window_block_indices": WINDOWED,
    "residual_block_indices": [2],
    "use_relative_position_embeddings": True,
    "use_absolute_position_embeddings": True,
    "pretrain_image_size": 32,
    "mlp_ratio": 2,
    "out_features": ["stage2", "stage6"],
}
_SAM3_VIT = {**SAM, "pretrain_image_size": 32, "rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}}


def points(batch: int) -> dict[str, Tensor]:
    """A point in each image to segment by."""
    return {"input_points": torch.full((batch, 1, 1, 2), 9.0).double()}


def sam(prefix: str, **decoder: Any) -> Callable[[], nn.Module]:
    """A whole SAM, which segments by prompts."""
    return make.of(
        f"{prefix}Model",
        f"{prefix}Config",
        vision_config={**SAM, "num_pos_feats": 8},
        prompt_encoder_config=_PROMPTS,
        mask_decoder_config={**_DECODER, "iou_head_hidden_dim": 16, **decoder},
    )


def samvit(**differs: Any) -> Callable[[], nn.Module]:
    """timm's."""
    return make.timm_model("samvit_base_patch16", neck_chans=16, **WINDOWS, **differs)


MAPS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    *(
        (
            (
                f"{family} vision (transformers)",
                "vision_encoder.layers.{}.attn",
                0,
                (f"{prefix}VisionModel", make.of(f"{prefix}VisionModel", f"{prefix}VisionConfig", **SAM), ""),
                (f"{prefix}Model", sam(prefix, **decoder), "", {"inputs": points}),
            ),
            {},
        )
        for family, prefix, decoder in (("SAM", "Sam", {}), ("SAM-HQ", "SamHQ", {"vit_dim": make.SHAPE["hidden_size"]}))
    ),
    (
        (
            "GOT-OCR 2 vision (transformers)",
            "layers.{}.attn",
            0,
            *(
                (name, make.vision_language(name, "GotOcr2Config", vision_config=SAM, text_config=_QWEN2), path)
                for name, path in (
                    ("GotOcr2Model", "vision_tower"),
                    ("GotOcr2ForConditionalGeneration", "model.vision_tower"),
                )
            ),
        ),
        {"inputs": make.places_for(1)},
    ),
    (
        (
            "SLANeXt vision (transformers)",
            "layers.{}.attn",
            0,
            # Its table head runs in float32 alone.
            (
                "SLANeXtBackbone",
                make.of("SLANeXtBackbone", "SLANeXtConfig", vision_config=SAM, **_NECK),
                "vision_tower",
            ),
        ),
        {"given": lambda images: {"hidden_states": images}},
    ),
    (
        (
            "PP-FormulaNet vision (transformers)",
            "layers.{}.attn",
            0,
            (
                "PPFormulaNetVisionModel",
                make.of("PPFormulaNetVisionModel", "PPFormulaNetVisionConfig", **_FORMULA["vision_config"]),
                "",
                {"since": "transformers 5.24"},  # before, the host could not load it alone
            ),
            (
                "PPFormulaNetForConditionalGeneration",
                make.of("PPFormulaNetForConditionalGeneration", "PPFormulaNetConfig", **_FORMULA),
                "model.encoder",
                {"inputs": lambda batch: {"decoder_input_ids": torch.tensor([[3, 4]]).repeat(batch, 1)}},
            ),
        ),
        {},
    ),
    *(
        (
            (
                f"{family} vision (transformers)",
                "sam_encoder.layers.{}.attn",
                0,
                (f"{prefix}VisionModel", make.of(f"{prefix}VisionModel", f"{prefix}VisionConfig", **parts), ""),
            ),
            {"since": since},
        )
        for family, prefix, parts, since in (
            ("DeepSeek-OCR 2", "DeepseekOcr2", _OCR, "transformers 5.24"),  # before, the host could not load it alone
            ("Unlimited-OCR", "UnlimitedOcr", _UNLIMITED, "transformers 5.24"),
        )
    ),
    (
        (
            "SAM 3 vision (transformers)",
            "layers.{}.attention",
            0,
            ("Sam3ViTModel", make.of("Sam3ViTModel", "Sam3ViTConfig", **_SAM3_VIT), ""),
            (
                "Sam3VisionModel",
                make.of(
                    "Sam3VisionModel",
                    "Sam3VisionConfig",
                    backbone_config={**_SAM3_VIT, "model_type": "sam3_vit_model"},
                    fpn_hidden_size=16,
                ),
                "backbone",
            ),
        ),
        {},
    ),
    (
        (
            "VitDet (transformers)",
            "encoder.layer.{}.attention",
            0,
            *(
                (name, make.hf(name, "VitDetConfig", **_VITDET), "", SIZES)
                for name in ("VitDetModel", "VitDetBackbone")
            ),
        ),
        {},
    ),
    (
        (
            "SAM ViT (timm)",
            "blocks.{}.attn",
            0,
            ("timm samvit", samvit(use_rel_pos=True, init_values=0.5), "", SIZES),
            ("timm samvit, rope", samvit(use_rel_pos=False, use_rope=True), ""),
        ),
        {},
    ),
]

# Blocks 2 and 5 are global. Maps must be of whole windows, which its position embeddings repeat.
SAM2: dict[str, Any] = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "image_size": [32, 32],
    "patch_stride": [4, 4],
    "mlp_ratio": 1.5,
    "blocks_per_stage": [4, 2],
    "embed_dim_per_stage": [16, 32],
    "num_attention_heads_per_stage": [2, 4],
    "window_size_per_stage": [4, 2],
    "global_attention_blocks": [2, 5],
    "num_query_pool_stages": 1,
    "window_positional_embedding_background_size": [2, 2],
}
_SAM2_VISION: dict[str, Any] = {
    "backbone_config": {**SAM2, "model_type": "sam2_hiera_det_model"},
    "backbone_channel_list": [32, 16],
    "backbone_feature_sizes": [[8, 8], [4, 4]],
    "fpn_hidden_size": 16,
    "fpn_top_down_levels": [1],
    "num_feature_levels": 2,
}
# The same of timm, which knows the side of images by what its weights are for.
HIERADET: dict[str, Any] = {
    "embed_dim": 16,
    "num_heads": 2,
    "num_classes": 5,
    "stages": (4, 2),
    "q_pool": 1,
    "window_spec": (4, 2),
    "global_att_blocks": (2, 5),
    "global_pos_size": (2, 2),
    "pretrained_cfg_overlay": {"input_size": (3, 32, 32)},
}
STAGED: list[Case] = [
    Case(
        name,
        "SAM 2 vision (transformers)",
        build,
        InStages(f"{path}blocks.{{}}.attn", (4, 2), flat=True),
        prefix=0,
        patch=4,
        others=((32, 64), (64, 32), (48, 80)),
    )
    for name, path, build in (
        ("Sam2HieraDetModel", "", make.of("Sam2HieraDetModel", "Sam2HieraDetConfig", **SAM2)),
        ("Sam2VisionModel", "backbone.", make.of("Sam2VisionModel", "Sam2VisionConfig", **_SAM2_VISION)),
    )
] + [
    Case(
        f"timm hieradet{also}",
        "HieraDet (timm)",
        make.timm_hiera("hieradet_small", **HIERADET, **differs),
        InStages(f"{path}blocks.{{}}.attn", (4, 2), flat=True),
        prefix=0,
        patch=4,
        others=((32, 64), (64, 32), (48, 80)),
    )
    for also, path, differs in (
        ("", "", {}),
        (", features only", "model.", {"features_only": True, "out_indices": (0, 1)}),
    )
]

CASES: list[Case] = [case for args, differs in MAPS for case in cases_of(*args, **differs)] + STAGED
