"""The families of transformers that can be cut, whose images all have one size."""

from __future__ import annotations

from typing import Any

from torch import nn

from .family import Family, Grid, pair
from .transformers_folded_families import FOLDED_FAMILIES
from .transformers_map_families import MAP_FAMILIES
from .transformers_projections import all_rotary_projections, normed_projections, rotary_projections
from .transformers_ragged_families import RAGGED_FAMILIES
from .transformers_shapes import (
    BLIP,
    CLIP,
    OWL,
    SHAPE_C,
    SHAPE_D,
    SHAPE_O,
    SHAPE_V,
    image_size_of,
    registers_of,
    transformers_family,
)
from .transformers_stage_families import STAGE_FAMILIES


def _video_size(tower: Any) -> tuple[int, ...]:
    return (tower.config.num_frames, *image_size_of(tower))


def _clip_size(tower: Any) -> tuple[int, ...]:
    return (tower.config.frames_per_clip, tower.config.in_chans, *pair(tower.config.crop_size))


def _tubelets(embeddings: Any, frames: int, height: int, width: int) -> Grid:
    """Of embeddings that cut a video into tubelets by one convolution; V-JEPA 2 repeats fewer frames than one has."""
    sides = next(module for module in embeddings.modules() if isinstance(module, nn.Conv3d)).kernel_size
    frames = frames * sides[0] if frames < sides[0] else frames
    return frames // sides[0], height // sides[1], width // sides[2]


def _video(*args: Any, **shape: Any) -> Family:
    """A family of videos (B, T, C, H, W), whose patches are tubelets."""
    return transformers_family(*args, image_to_grid=_tubelets, **{"image_size": _video_size, **shape})


def _refuse_dpt(tower: Any) -> str | None:
    if tower.config.is_hybrid:
        return "its tokens come from a convolutional backbone; use a DPT with is_hybrid=False"
    return None


def _refuse_packed(pixel_values: Any, image_grid_hw: Any = None) -> str | None:
    if image_grid_hw is not None:
        return "patches that are packed (image_grid_hw) have no one grid; give it images (B, C, H, W) of one size"
    return None


def _spectrogram_size(tower: Any) -> tuple[int, int, int]:
    return (1, tower.config.max_length, tower.config.num_mel_bins)


def _spectrogram_grid(embeddings: Any, length: int, num_mel_bins: int) -> Grid:
    """Frequencies by times, of patches that overlap."""
    config = embeddings.config
    ends = num_mel_bins - config.patch_size, length - config.patch_size
    return ends[0] // config.frequency_stride + 1, ends[1] // config.time_stride + 1


def _query_blocks(tower: Any) -> int:
    return tower.config.num_blocks


_EOMT: dict[str, Any] = {**SHAPE_D, "blocks": "layers", "num_late_blocks": _query_blocks}

FAMILIES: tuple[Family, ...] = (
    transformers_family("ViT and DINO", "vit", ("ViTModel",), "ViTLayer", 1, **SHAPE_V),
    transformers_family("DeiT", "deit", ("DeiTModel",), "DeiTLayer", 2, **SHAPE_V),
    transformers_family("ViTMSN", "vit_msn", ("ViTMSNModel",), "ViTMSNLayer", 1, **SHAPE_V),
    transformers_family("I-JEPA", "ijepa", ("IJepaModel",), "IJepaLayer", 0, **SHAPE_V),
    transformers_family("BEiT", "beit", ("BeitModel",), "BeitLayer", 1, **SHAPE_V, drop=("relative_position_bias",)),
    transformers_family("DINOv2", "dinov2", ("Dinov2Model", "Dinov2Backbone"), "Dinov2Layer", 1, **SHAPE_D),
    transformers_family(
        "DINOv2 with registers",
        "dinov2_with_registers",
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"),
        "Dinov2WithRegistersLayer",
        registers_of,
        **SHAPE_D,
    ),
    transformers_family(
        "DINOv3 ViT",
        "dinov3_vit",
        ("DINOv3ViTModel", "DINOv3ViTBackbone"),
        "DINOv3ViTLayer",
        registers_of,
        **{**SHAPE_D, "blocks": "model.layer", "final_norm": "norm"},
    ),
    transformers_family("CLIP vision", "clip", ("CLIPVisionModel",), "CLIPEncoderLayer", 1, **CLIP),
    transformers_family(
        "MetaCLIP 2 vision", "metaclip_2", ("MetaClip2VisionModel",), "MetaClip2EncoderLayer", 1, **CLIP
    ),
    transformers_family("SigLIP vision", "siglip", ("SiglipVisionModel",), "SiglipEncoderLayer", 0, **SHAPE_C),
    transformers_family(
        "AIMv2 vision",
        "aimv2",
        ("Aimv2VisionModel",),
        "Aimv2EncoderLayer",
        0,
        blocks="encoder.layers",
        norm="rms_norm1",
        attention="attention",
        returns_tuple=True,
        final_norm="rms_norm",
    ),
    transformers_family(
        "YOLOS",
        "yolos",
        ("YolosModel",),
        "YolosLayer",
        1,
        **SHAPE_O,
        num_suffix_tokens=lambda tower: tower.config.num_detection_tokens,
        adds_between="encoder",
    ),
    transformers_family("DPT", "dpt", ("DPTModel",), "DPTViTLayer", 1, **SHAPE_O, refuse=_refuse_dpt),
    transformers_family(
        "Pixio", "pixio", ("PixioModel",), "PixioLayer", lambda tower: tower.config.n_cls_tokens, **SHAPE_V
    ),
    transformers_family(
        "ViTPose backbone", "vitpose_backbone", ("VitPoseBackbone",), "VitPoseBackboneLayer", 0, **SHAPE_O
    ),
    _video("VideoMAE", "videomae", ("VideoMAEModel",), "VideoMAELayer", 0, **SHAPE_O),
    _video("ViViT", "vivit", ("VivitModel",), "VivitLayer", 1, **SHAPE_V),
    _video(
        "V-JEPA 2",
        "vjepa2",
        ("VJEPA2Encoder",),
        "VJEPA2Layer",
        0,
        **{**SHAPE_D, "blocks": "layer"},
        blocks_return_tuple=True,
        image_size=_clip_size,
        projections=rotary_projections,
    ),
    transformers_family(
        "InternVL vision",
        "internvl",
        ("InternVLVisionModel",),
        "InternVLVisionLayer",
        1,
        **{**SHAPE_V, "blocks": "encoder.layer"},
    ),
    transformers_family(
        "Qianfan-OCR vision", "qianfan_ocr", ("QianfanOCRVisionModel",), "QianfanOCRVisionLayer", 1, **SHAPE_V
    ),
    transformers_family("Janus vision", "janus", ("JanusVisionModel",), "JanusVisionEncoderLayer", 0, **SHAPE_C),
    transformers_family(
        "Ovis2 vision",
        "ovis2",
        ("Ovis2VisionModel",),
        "Ovis2VisionEncoderLayer",
        0,
        blocks="transformer.encoder.layers",
        norm="rms_norm1",
        attention="attention",
        returns_tuple=True,
        embeddings="transformer.embeddings",
        final_norm="transformer.rms_norm",
    ),
    transformers_family(
        "Step 3 vision",
        "step3p7",
        ("Step3p7VisionModel",),
        "Step3p7VisionEncoderLayer",
        0,
        **{**SHAPE_V, "attention": "self_attn", "final_norm": None, "carriers": ("pre_layernorm",)},
    ),
    transformers_family(
        "Granite-Docling vision",
        "granite_docling",
        ("GraniteDoclingVisionModel",),
        "GraniteDoclingEncoderLayer",
        0,
        **SHAPE_C,
    ),
    transformers_family(
        "Idefics vision",
        "idefics",
        ("IdeficsVisionTransformer",),
        "IdeficsVisionEncoderLayer",
        1,
        **CLIP,
        file="vision",
    ),
    transformers_family(
        "Idefics 2 vision", "idefics2", ("Idefics2VisionTransformer",), "Idefics2EncoderLayer", 0, **SHAPE_C
    ),
    transformers_family(
        "Idefics 3 vision", "idefics3", ("Idefics3VisionTransformer",), "Idefics3EncoderLayer", 0, **SHAPE_C
    ),
    transformers_family(
        "SmolVLM vision", "smolvlm", ("SmolVLMVisionTransformer",), "SmolVLMEncoderLayer", 0, **SHAPE_C
    ),
    transformers_family(
        "Phi-4 Multimodal vision",
        "phi4_multimodal",
        ("Phi4MultimodalVisionModel",),
        "Phi4MultimodalVisionEncoderLayer",
        0,
        **SHAPE_C,
    ),
    transformers_family("OWL-ViT vision", "owlvit", ("OwlViTVisionTransformer",), "OwlViTEncoderLayer", 1, **OWL),
    transformers_family("OWLv2 vision", "owlv2", ("Owlv2VisionTransformer",), "Owlv2EncoderLayer", 1, **OWL),
    transformers_family("CLIPSeg vision", "clipseg", ("CLIPSegVisionModel",), "CLIPSegEncoderLayer", 1, **CLIP),
    transformers_family(
        "Chinese-CLIP vision", "chinese_clip", ("ChineseCLIPVisionModel",), "ChineseCLIPVisionLayer", 1, **CLIP
    ),
    transformers_family("AltCLIP vision", "altclip", ("AltCLIPVisionModel",), "AltCLIPEncoderLayer", 1, **CLIP),
    transformers_family(
        "Kosmos-2 vision", "kosmos2", ("Kosmos2VisionTransformer",), "Kosmos2VisionEncoderLayer", 1, **CLIP
    ),
    transformers_family(
        "GIT vision",
        "git",
        ("GitVisionModel",),
        "GitVisionEncoderLayer",
        1,
        **{
            **SHAPE_C,
            "embeddings": "vision_model.embeddings",
            "blocks": "vision_model.encoder.layers",
            "carriers": ("vision_model.pre_layrnorm",),
            "final_norm": "vision_model.post_layernorm",
        },
    ),
    transformers_family("BLIP vision", "blip", ("BlipVisionModel",), "BlipEncoderLayer", 1, **BLIP),
    transformers_family("BLIP-2 vision", "blip_2", ("Blip2VisionModel",), "Blip2EncoderLayer", 1, **BLIP),
    transformers_family(
        "InstructBLIP vision", "instructblip", ("InstructBlipVisionModel",), "InstructBlipEncoderLayer", 1, **BLIP
    ),
    transformers_family(
        "InstructBLIP-Video vision",
        "instructblipvideo",
        ("InstructBlipVideoVisionModel",),
        "InstructBlipVideoEncoderLayer",
        1,
        **BLIP,
    ),
    transformers_family(
        "MLCD vision", "mlcd", ("MLCDVisionModel",), "MLCDEncoderLayer", 1, **CLIP, projections=all_rotary_projections
    ),
    transformers_family(
        "TIPSv2 vision",
        "tipsv2",
        ("Tipsv2VisionModel", "Tipsv2VisionBackbone"),
        "Tipsv2VisionLayer",
        registers_of,
        **SHAPE_D,
    ),
    transformers_family(
        "RADIO",
        "radio",
        ("RadioModel",),
        "RadioLayer",
        lambda tower: tower.config.num_summary_tokens,
        **{**SHAPE_D, "final_norm": None},
        refuse_input=_refuse_packed,
    ),
    transformers_family(
        "Sapiens 2",
        "sapiens2",
        ("Sapiens2Model", "Sapiens2Backbone"),
        "Sapiens2Layer",
        registers_of,
        **{**SHAPE_D, "blocks": "model.layer", "final_norm": "norm"},
        projections=normed_projections,
    ),
    transformers_family(
        "Audio Spectrogram Transformer",
        "audio_spectrogram_transformer",
        ("ASTModel",),
        "ASTLayer",
        2,
        **SHAPE_V,
        image_size=_spectrogram_size,
        image_to_grid=_spectrogram_grid,
        input_shape=lambda tower: _spectrogram_size(tower)[1:],
    ),
    transformers_family("EoMT", "eomt", ("EomtForUniversalSegmentation",), "EomtLayer", registers_of, **_EOMT),
    transformers_family(
        "EoMT with DINOv3",
        "eomt_dinov3",
        ("EomtDinov3ForUniversalSegmentation",),
        "EomtDinov3Layer",
        registers_of,
        **_EOMT,
        carriers=("dropout",),
    ),
    transformers_family(
        "VidEoMT",
        "videomt",
        ("VideomtForUniversalSegmentation",),
        "VideomtLayer",
        registers_of,
        **_EOMT,
        input_shape=lambda tower: (1, *image_size_of(tower)),  # a video of one frame
    ),
    *RAGGED_FAMILIES,
    *MAP_FAMILIES,
    *STAGE_FAMILIES,
    *FOLDED_FAMILIES,
)
