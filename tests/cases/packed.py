"""Further hosts that pack the patches of all images into one sequence, as Qwen's towers do."""

from __future__ import annotations

from functools import partial
from typing import Any

import small_models as make
from torch import nn

from .case import Case
from .making import cases_of
from .ragged import NAMES, QWEN_TEXT, even_sizes_of, qwen, text_with_places

_SHAPE: dict[str, Any] = {"hidden_size": 32, "num_heads": 4, "patch_size": 8, "depth": make.DEPTH}
_QWEN = {**_SHAPE, "intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 16}
_GLM = {**_SHAPE, "intermediate_size": 48, "out_hidden_size": 32, "image_size": 32}
_GLM_IMAGE = {**_SHAPE, "intermediate_size": 48, "image_size": 32}
_ERNIE = {**_SHAPE, "intermediate_size": 48, "patch_size": 2}
_DOTS = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "patch_size": 2,
    "intermediate_size": 48,
    "num_hidden_layers": make.DEPTH,
    "mlp_layer_types": ["dense"] * 4 + ["sparse"] * 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "adapter_in_dim": 32,
    "adapter_out_dim": 32,
    "experts_implementation": "eager",  # the others take no float64
}
# 6×6 patches make a window, and those at the edges are smaller.
_WINDOWED = {**_SHAPE, "intermediate_size": 48, "patch_size": 2, "out_hidden_size": 32, "window_size": 12}
_WINDOWED |= {"fullatt_block_indexes": [3]}
_EXAONE = {**_WINDOWED, "fullatt_block_indexes": [0, 4], "num_key_value_heads": 2}
_AUDIO = {
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "d_model": 16,
    "output_dim": 32,
    "num_mel_bins": 8,
}
_HEARS = {"downsample_hidden_size": 8}
_MIXED = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "mlp_only_layers": [0, 1]}
_DEEP = {"deepstack_visual_indexes": [1]}


def _thinker(name: str, vision: dict[str, Any], audio: dict[str, Any], tokens: str, **text: Any) -> Any:
    """Of the Omni models the part that sees and hears: no class of transformers has their vision tower alone."""
    config = {
        "vision_config": vision,
        "audio_config": {**_AUDIO, **audio},
        "text_config": {**QWEN_TEXT["text_config"], **text},
        "vision_start_token_id": 10,
        **{f"{kind}_token_{tokens}": token for kind, token in (("image", 9), ("video", 11), ("audio", 12))},
    }
    name = f"{name}Thinker"
    return f"{name}ForConditionalGeneration", make.of(f"{name}ForConditionalGeneration", f"{name}Config", **config)


def _glm_image() -> nn.Module:
    """Its position embeddings are not trained here: it interpolates them, and sums their gradients, in float32."""
    model = make.of("GlmImageVisionModel", "GlmImageVisionConfig", **_GLM_IMAGE)()
    model.get_submodule("embeddings").requires_grad_(False)
    return model


def _tower(name: str, config: str, shape: dict[str, Any], **differs: Any) -> Any:
    return name, make.of(name, config, **shape), "", differs


_SEEN = ("model.visual",)
_TEXT_3 = {"inputs": text_with_places(2, 2), "others": (), "since": "transformers 5.24"}  # before, `visual` was outside
_TEXT_2 = {**_TEXT_3, "inputs": text_with_places(56, 32), "window": 6}
_SIZES: dict[str, Any] = {"merge": 2, "sizes": even_sizes_of, "others": ((32, 64), (64, 32))}
# Those without position embeddings know no size: 16 patches a side, which are two pixels wide here.
_NO_SIZE: dict[str, Any] = {"patch": 2, "sizes": partial(even_sizes_of, side=2), "others": ((16, 32), (32, 16))}

CASES: list[Case] = [
    case
    for family, variant, given, merge in (
        (
            "Qwen2.5-VL",
            _tower("Qwen2_5_VisionTransformerPretrainedModel", "Qwen2_5_VLVisionConfig", _WINDOWED, window=6),
            {"side": 2},
            2,
        ),
        ("Qwen2.5-Omni", (*_thinker("Qwen2_5Omni", _WINDOWED, {}, "index"), *_SEEN, _TEXT_2), {"side": 2, **NAMES}, 2),
        ("EXAONE 4.5", _tower("Exaone4_5_VisionModel", "Exaone4_5_VisionConfig", _EXAONE, window=6), {"side": 2}, 2),
        ("Qwen3-Omni", (*_thinker("Qwen3OmniMoe", _QWEN | _DEEP, _HEARS, "id", **_MIXED), *_SEEN, _TEXT_3), NAMES, 2),
        ("Qwen4-Exp", _tower("Qwen4ExpVisionModel", "Qwen4ExpVisionConfig", _QWEN), {}, 2),
        ("Cohere Compass", _tower("CohereCompassVisionModel", "CohereCompassVisionConfig", _QWEN | _DEEP), {}, 2),
        ("GLM-4V-MoE", _tower("Glm4vMoeVisionModel", "Glm4vMoeVisionConfig", _GLM), {}, 2),
        ("GLM-OCR", _tower("GlmOcrVisionModel", "GlmOcrVisionConfig", _GLM), {}, 2),
        ("GLM-5", _tower("Glm5NextVisionModel", "Glm5NextVisionConfig", _GLM), {}, 2),
        (
            "GLM-Image",
            ("GlmImageVisionModel", _glm_image, ""),
            {"name": "pixel_values", "merge": 1, "shown": 1},
            1,
        ),
        (
            "ERNIE 4.5 VL",
            _tower("Ernie4_5_VLMoeVisionTransformerPretrainedModel", "Ernie4_5_VLMoeVisionConfig", _ERNIE),
            {"shown": 1, "side": 2},
            2,
        ),
        (
            "dots.3 note",
            _tower("Dots3NoteVisionModel", "Dots3NoteVisionConfig", _DOTS, since="transformers 5.24"),
            {"name": "pixel_values", "shown": 1, "side": 2},
            2,
        ),
    )
    for case in cases_of(
        f"{family} vision (transformers)",
        "blocks.{}.attn",
        0,
        variant,
        **{**_SIZES, **(_NO_SIZE if "side" in given else {}), "merge": merge, "given": partial(qwen, **given)},
    )
]
