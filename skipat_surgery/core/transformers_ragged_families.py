"""The families of transformers whose images may have a grid each, padded or packed into one sequence."""

from __future__ import annotations

from typing import Any

from .family import Family
from .packed_grids import (
    glm_image_grids,
    glm_size,
    pixtral_grids,
    qwen2_size,
    qwen_grid,
    qwen_grids,
    qwen_inputs,
    qwen_size,
    windowed_grids,
)
from .padded_grids import siglip2_grids, siglip2_inputs, siglip2_size
from .transformers_projections import packed_projections, packed_shared_projections
from .transformers_shapes import SHAPE_C, transformers_family

_QWEN: dict[str, Any] = {
    "blocks": "blocks",
    "norm": "norm1",
    "attention": "attn",
    "returns_tuple": False,
    "embeddings": None,
    "image_to_grid": qwen_grid,
    "image_size": qwen_size,
    "projections": packed_projections,
    "inputs": qwen_inputs,
    "ragged": qwen_grids,
    "packs": True,
}
_MERGED: dict[str, Any] = {"final_norm": "merger.norm"}
_OMNI: dict[str, Any] = {"final_norm": "merger.ln_q"}
_GLM: dict[str, Any] = {"final_norm": "post_layernorm", "image_size": glm_size}
_GLM_IMAGE: dict[str, Any] = {"final_norm": None, "image_size": glm_size, "ragged": glm_image_grids}
_NO_POSITIONS: dict[str, Any] = {"final_norm": "ln", "image_size": qwen2_size}
_DOTS: dict[str, Any] = {"final_norm": "norm", "image_size": qwen2_size, "ragged": glm_image_grids}
_WINDOWED: dict[str, Any] = {
    "final_norm": "merger.ln_q",
    "image_size": qwen2_size,
    "ragged": windowed_grids,
    "global_blocks": lambda tower: tower.config.fullatt_block_indexes,
}
_EXAONE = {**_WINDOWED, "projections": packed_shared_projections}
_QWEN2_5 = "Qwen2_5_VisionTransformerPretrainedModel"
_ERNIE = "Ernie4_5_VLMoeVision"

RAGGED_FAMILIES: tuple[Family, ...] = (
    transformers_family(
        "SigLIP 2 vision",
        "siglip2",
        ("Siglip2VisionModel",),
        "Siglip2EncoderLayer",
        0,
        **SHAPE_C,
        image_size=siglip2_size,
        inputs=siglip2_inputs,
        ragged=siglip2_grids,
    ),
    transformers_family(
        "Qwen2-VL vision",
        "qwen2_vl",
        ("Qwen2VisionTransformerPretrainedModel",),
        "Qwen2VLVisionBlock",
        0,
        **{**_QWEN, "image_size": qwen2_size, "width": lambda tower: tower.config.embed_dim},
        final_norm="merger.ln_q",
    ),
    *(
        transformers_family(f"{name} vision", module, (tower,), block, 0, **{**_QWEN, **differs})
        for name, module, tower, block, differs in (
            ("Qwen2.5-VL", "qwen2_5_vl", _QWEN2_5, "Qwen2_5_VLVisionBlock", _WINDOWED),
            ("Qwen2.5-Omni", "qwen2_5_omni", "Qwen2_5OmniVisionEncoder", "Qwen2_5OmniVisionBlock", _WINDOWED),
            ("EXAONE 4.5", "exaone4_5", "Exaone4_5_VisionModel", "Exaone4_5_VisionBlock", _EXAONE),
            ("Qwen3-VL", "qwen3_vl", "Qwen3VLVisionModel", "Qwen3VLVisionBlock", _MERGED),
            ("Qwen3-VL-MoE", "qwen3_vl_moe", "Qwen3VLMoeVisionModel", "Qwen3VLMoeVisionBlock", _MERGED),
            ("Qwen3-Omni", "qwen3_omni_moe", "Qwen3OmniMoeVisionEncoder", "Qwen3OmniMoeVisionBlock", _OMNI),
            ("Qwen3.5", "qwen3_5", "Qwen3_5VisionModel", "Qwen3_5VisionBlock", _MERGED),
            ("Qwen3.5-MoE", "qwen3_5_moe", "Qwen3_5MoeVisionModel", "Qwen3_5MoeVisionBlock", _MERGED),
            ("Qwen4-Exp", "qwen4_exp", "Qwen4ExpVisionModel", "Qwen4ExpVisionBlock", _MERGED),
            ("Cohere Compass", "cohere_compass", "CohereCompassVisionModel", "CohereCompassVisionBlock", _MERGED),
            ("GLM-4V", "glm4v", "Glm4vVisionModel", "Glm4vVisionBlock", _GLM),
            ("GLM-4V-MoE", "glm4v_moe", "Glm4vMoeVisionModel", "Glm4vMoeVisionBlock", _GLM),
            ("GLM-OCR", "glm_ocr", "GlmOcrVisionModel", "GlmOcrVisionBlock", _GLM),
            ("GLM-5", "glm5_next", "Glm5NextVisionModel", "Glm5NextVisionBlock", _GLM),
            ("GLM-Image", "glm_image", "GlmImageVisionModel", "GlmImageVisionBlock", _GLM_IMAGE),
            ("ERNIE 4.5 VL", "ernie4_5_vl_moe", f"{_ERNIE}TransformerPretrainedModel", f"{_ERNIE}Block", _NO_POSITIONS),
            ("dots.3 note", "dots3_note", "Dots3NoteVisionModel", "Dots3NoteVisionBlock", _DOTS),
        )
    ),
    transformers_family(
        "Pixtral vision",
        "pixtral",
        ("PixtralVisionModel",),
        "PixtralAttentionLayer",
        0,
        blocks="transformer.layers",
        norm="attention_norm",
        attention="attention",
        returns_tuple=True,
        embeddings=None,
        final_norm=None,
        projections=packed_projections,
        ragged=pixtral_grids,
        packs=True,
    ),
)
