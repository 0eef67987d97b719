"""Of timm."""

from __future__ import annotations

from typing import Any

import small_models as make
import timm

from .case import Case
from .making import (
    FIXED,
    SIZES,
    WIDE,
    cases_of,
)

_NAFLEX: dict[str, Any] = {"pos_embed_grid_size": (4, 4), "img_size": None}

CASES: list[Case] = [
    *cases_of(
        "VisionTransformer (timm)",
        "blocks.{}.attn",
        1,
        ("timm vit", make.timm_model("vit_tiny_patch16_224"), ""),
        ("timm vit, dynamic size", make.timm_model("vit_tiny_patch16_224", dynamic_img_size=True), "", SIZES),
        ("timm vit, wide", make.timm_model("vit_tiny_patch16_224", img_size=(16, 32)), "", WIDE),
        (
            "timm vit, registers",
            make.timm_model("vit_small_patch14_reg4_dinov2", init_values=0.1, dynamic_img_size=True),
            "",
            {"prefix": 5, **SIZES},
        ),
        ("timm vit, pre-norm", make.timm_model("vit_base_patch32_clip_224"), ""),
        (
            "timm vit, average pool",
            make.timm_model("vit_tiny_patch16_224", global_pool="avg", class_token=False),
            "",
            {"prefix": 0},
        ),
        ("timm vit, QK norm", make.timm_model("vit_tiny_patch16_224", qk_norm=True), ""),
        ("timm vit, differential attention", make.timm_model("vit_tiny_patch16_224", attn_layer="diff"), ""),
        (
            "timm vit, hybrid",
            make.timm_model("vit_tiny_r_s16_p8_224", img_size=64, patch_size=4, dynamic_img_size=True),
            "",
            {"size": (64, 64), "patch": 16, "others": ((32, 128),)},
        ),
        (
            "timm vit, features only",
            make.timm_model("vit_tiny_patch16_224", features_only=True, num_classes=None),
            "model",
        ),
        ("TimmWrapperModel", make.timm_wrapper("TimmWrapperModel"), "timm_model"),
        (
            "TimmWrapperForImageClassification",
            make.timm_wrapper("TimmWrapperForImageClassification"),
            "timm_model",
        ),
    ),
    *cases_of(
        "VisionTransformer with res-post (timm)",
        "blocks.{}.attn",
        1,
        (
            "timm vit, res-post",
            make.timm_model(
                "vit_tiny_patch16_224", block_fn=timm.models.vision_transformer.ResPostBlock, dynamic_img_size=True
            ),
            "",
        ),
        **SIZES,
    ),
    *cases_of(
        "VisionTransformerDistilled (timm)",
        "blocks.{}.attn",
        2,
        ("timm deit, distilled", make.timm_model("deit_tiny_distilled_patch16_224"), ""),
    ),
    *cases_of(
        "BEiT (timm)",
        "blocks.{}.attn",
        1,
        ("timm beit", make.timm_model("beitv2_base_patch16_224"), ""),
        (
            "timm beit, shared bias",
            make.timm_model(
                "beit_base_patch16_224", use_rel_pos_bias=False, use_shared_rel_pos_bias=True, img_size=(16, 32)
            ),
            "",
            WIDE,
        ),
    ),
    *cases_of(
        "EVA/EVA02/DINOv3/rope (timm)",
        "blocks.{}.attn",
        1,
        ("timm eva02", make.timm_model("eva02_tiny_patch14_224", patch_size=8, dynamic_img_size=True), ""),
        ("timm dinov3", make.timm_model("vit_small_patch16_dinov3", img_size=32), "", {"prefix": 5}),
        (
            "timm rope, mixed",
            make.timm_model("vit_small_patch16_rope_mixed_224", dynamic_img_size=True),
            "",
        ),
        ("timm eva", make.timm_model("eva_giant_patch14_224"), "", FIXED),
        **SIZES,
    ),
    *cases_of(
        "EVA with post-norm (timm)",
        "blocks.{}.attn",
        1,
        (
            "timm eva, post-norm",
            make.timm_model("eva02_tiny_patch14_224", use_post_norm=True, dynamic_img_size=True),
            "",
        ),
        **SIZES,
    ),
    *cases_of(
        "relative position (timm)",
        "blocks.{}.attn",
        0,
        ("timm relpos", make.timm_model("vit_relpos_small_patch16_224"), ""),
        ("timm relpos, class token", make.timm_model("vit_relpos_base_patch16_cls_224"), "", {"prefix": 1}),
        ("timm relpos, shared", make.timm_model("vit_srelpos_small_patch16_224", img_size=(16, 32)), "", WIDE),
    ),
    *cases_of(
        "relative position with res-post (timm)",
        "blocks.{}.attn",
        0,
        (
            "timm relpos, res-post",
            make.timm_model(
                "vit_relpos_small_patch16_224", block_fn=timm.models.vision_transformer_relpos.ResPostRelPosBlock
            ),
            "",
        ),
    ),
    *cases_of(
        "CaiT (timm)",
        "blocks.{}.attn",
        0,
        ("timm cait", make.timm_model("cait_xxs24_224"), ""),
        ("timm cait, average pool", make.timm_model("cait_xxs24_224", global_pool="avg"), ""),
    ),
    *cases_of(
        "NaFlexViT (timm)",
        "blocks.{}.attn",
        1,
        ("timm naflex", make.timm_model("naflexvit_base_patch16_gap", class_token=True, **_NAFLEX), "", {"prefix": 5}),
        (
            "timm naflex, no prefix",
            make.timm_model("naflexvit_base_patch16_map", reg_tokens=0, **_NAFLEX),
            "",
            {"prefix": 0},
        ),
        (
            "timm naflex, factorised positions",
            make.timm_model("naflexvit_base_patch16_parfac_gap", **_NAFLEX),
            "",
            {"prefix": 4},
        ),
        **SIZES,
    ),
    *cases_of(
        "NaFlexViT with rope (timm)",
        "blocks.{}.attn",
        4,
        ("timm naflex, rope", make.timm_model("naflexvit_base_patch16_gap", rope_type="axial", **_NAFLEX), ""),
        ("timm naflex, mixed rope", make.timm_model("naflexvit_base_patch16_gap", rope_type="mixed", **_NAFLEX), ""),
        **SIZES,
    ),
    *cases_of(
        "Qwen3 ViT (timm)",
        "blocks.{}.attn",
        0,
        ("timm qwen3", make.timm_model("qwen3_vit_88m", pos_embed_grid_size=4, num_heads=2), "encoder"),
        (
            "timm qwen3, encoder",
            make.timm_model("qwen3_vit_88m_enc", pos_embed_grid_size=4, num_heads=2, out_features=24),
            "",
            {"others": ((16, 64), (64, 16))},  # its merger takes grids of even sides
        ),
        **SIZES,
        since="timm 1.0.30",
    ),
    *cases_of(
        "DeepSeek ViT (timm)",
        "blocks.{}.attn",
        0,
        ("timm deepseek", make.timm_model("deepseek_vit_412m", num_heads=2), "encoder"),
        ("timm deepseek, encoder", make.timm_model("deepseek_vit_412m_enc", num_heads=2, out_features=24), ""),
        **SIZES,
        since="timm 1.0.30",
    ),
    *cases_of(
        "Gemma 4 ViT (timm)",
        "blocks.{}.attn",
        0,
        ("timm gemma4", make.timm_model("gemma4_vit_167m_enc", global_pool="avg", **make.GEMMA4), ""),
        (
            "timm gemma4, soft tokens",
            make.timm_model("gemma4_vit_167m_enc", **make.GEMMA4),
            "",
            {"others": ((24, 96), (72, 48))},
        ),
        (
            "timm gemma4, classifier",
            make.timm_model("gemma4_vit_167m", **{**make.GEMMA4, "patch_size": 96, "img_size": None}),
            "encoder",
            {"size": (768, 768), "patch": 96, "others": ((576, 768),)},
        ),
        size=(48, 48),
        others=((16, 64), (48, 40)),
        since="timm 1.0.28",
    ),
]
