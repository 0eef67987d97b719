"""Small models of every supported family, built from configs with random weights: what the contract runs on.

A new family is one `Case` here, next to its entry in `skipat_surgery/core/*_families.py`. The first case of a family is
its lead: it stands for the family in the slow parts of the contract.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import small_models as make
import timm
import torch
import transformers
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A model to test on: how to build it, how to call it, and where its MSA and its patches are.

    Args:
        name: For the test ids.
        family: The family it belongs to, by name.
        build: Makes the model.
        msa: Path of the MSA of block i, with ``{}`` for i.
        prefix: Number of tokens before the patches.
        suffix: Number of tokens after them.
        size: Of the images, (height, width).
        patch: Side of a patch in pixels.
        others: Further sizes that the host takes as it was built.
        flags: Keyword arguments that a forward at those sizes needs.
        inputs: Further inputs, from the batch size.
        seed: Of the weights.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    msa: str
    prefix: int
    suffix: int = 0
    size: tuple[int, int] = (32, 32)
    patch: int = 8
    others: tuple[tuple[int, int], ...] = ()
    flags: dict[str, bool] = field(default_factory=dict)
    inputs: Callable[[int], dict[str, Tensor]] = lambda batch: {}
    seed: int = 0

    @property
    def is_timm(self) -> bool:
        return self.family.endswith("(timm)") and "TimmWrapper" not in self.name

    def model(self) -> nn.Module:
        """In float64, with every weight random: many start at zero, which would hide a missing path."""
        torch.manual_seed(self.seed)
        model = self.build().double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    def images(self, size: tuple[int, int] | None = None, batch: int = 2, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, 3, *(size or self.size), generator=generator, dtype=torch.float64)

    def grid(self, images: Tensor) -> tuple[int, int]:
        return images.shape[-2] // self.patch, images.shape[-1] // self.patch

    def call(self, model: Any, images: Tensor, **kwargs: Any) -> Any:
        return (
            model(images, **kwargs)
            if self.is_timm
            else model(pixel_values=images, **self.inputs(images.shape[0]), **kwargs)
        )

    def tensors(self, model: Any, images: Tensor, **kwargs: Any) -> list[Tensor]:
        """Every floating-point tensor of the output, in order."""
        return output_tensors(self.call(model, images, **kwargs))


def output_tensors(output: Any) -> list[Tensor]:
    """Every floating-point tensor in a model's output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, list) and output and all(isinstance(item, Tensor) and item.ndim == 2 for item in output):
        return [torch.stack(output)]  # LLaVA, from transformers 5.24 on: (N, D) of each image
    return [tensor for item in output for tensor in output_tensors(item)] if isinstance(output, (tuple, list)) else []


def _of(family: str, msa: str, prefix: int, *variants: tuple[Any, ...], **common: Any) -> list[Case]:
    """Cases of one family: (name, build, path of the tower, anything that differs)."""
    cases = []
    for name, build, tower, *differs in variants:
        settings = {"msa": f"{tower}.{msa}" if tower else msa, "prefix": prefix, **common, **(differs or [{}])[0]}
        cases.append(Case(name, family, build, **settings))
    return cases


_V, _D, _C, _O = (
    "layers.{}.attention",
    "encoder.layer.{}.attention",
    "encoder.layers.{}.self_attn",
    "encoder.layer.{}.attention",
)
_SIZES: dict[str, Any] = {"others": ((16, 64), (64, 16), (48, 40))}
_FLAG: dict[str, Any] = {**_SIZES, "flags": {"interpolate_pos_encoding": True}}
_WIDE: dict[str, Any] = {"size": (16, 32)}
_FIXED: dict[str, Any] = {"others": (), "flags": {}}


def _heads(prefix: str, tower: str, *heads: str, **kwargs: Any) -> list[tuple[Any, ...]]:
    """The bare model of a transformers family and its heads."""
    config = f"{prefix}Config"
    bare = (f"{prefix}Model", make.hf(f"{prefix}Model", config, **kwargs), "")
    return [bare, *((f"{prefix}{head}", make.hf(f"{prefix}{head}", config, **kwargs), tower) for head in heads)]


_BEIT = {"use_relative_position_bias": True, "use_mask_token": True, "layer_scale_init_value": 0.1}
_BEIT_HEAD = {**_BEIT, "out_indices": [1, 2, 4, 5], "pool_scales": [1, 2], "use_auxiliary_head": False}
_LONE = ("ViT and DINO", "DeiT", "ViTMSN", "I-JEPA")

CASES: list[Case] = [
    *_of(
        "ViT and DINO (transformers)",
        _V,
        1,
        *_heads("ViT", "vit", "ForImageClassification"),
        ("ViTForMaskedImageModeling", make.hf("ViTForMaskedImageModeling", "ViTConfig"), "vit", _FIXED),
        (
            "ViT, wide",
            make.hf("ViTForImageClassification", "ViTConfig", image_size=(16, 32)),
            "vit",
            {**_WIDE, **_FIXED},
        ),
        **_FLAG,
    ),
    *_of(
        "DeiT (transformers)",
        _V,
        2,
        *_heads("DeiT", "deit", "ForImageClassification", "ForImageClassificationWithTeacher"),
        ("DeiTForMaskedImageModeling", make.hf("DeiTForMaskedImageModeling", "DeiTConfig"), "deit", _FIXED),
        **_FLAG,
    ),
    *_of("ViTMSN (transformers)", _V, 1, *_heads("ViTMSN", "vit", "ForImageClassification"), **_FLAG),
    *_of("I-JEPA (transformers)", _V, 0, *_heads("IJepa", "ijepa", "ForImageClassification"), **_FLAG),
    *_of(
        "BEiT (transformers)",
        _V,
        1,
        *_heads("Beit", "beit", "ForImageClassification", "ForMaskedImageModeling", vocab_size=20, **_BEIT),
        (
            "BEiT, shared bias",
            make.hf("BeitModel", "BeitConfig", use_shared_relative_position_bias=True, vocab_size=20),
            "",
        ),
        ("BeitBackbone", make.hf("BeitBackbone", "BeitConfig", out_features=["stage2", "stage6"], **_BEIT), "beit"),
        (
            "BeitForSemanticSegmentation",
            make.hf("BeitForSemanticSegmentation", "BeitConfig", **_BEIT_HEAD),
            "beit",
            {"others": ()},
        ),
        **_SIZES,
    ),
    *_of(
        "DINOv2 (transformers)",
        _D,
        1,
        *_heads("Dinov2", "dinov2", "ForImageClassification"),
        ("Dinov2, gated MLP", make.hf("Dinov2Model", "Dinov2Config", use_swiglu_ffn=True), ""),
        ("Dinov2Backbone", lambda: transformers.Dinov2Backbone(make.backbone("Dinov2Config")), ""),
        ("DepthAnything", make.depth_anything, "backbone"),
        ("DPT with DINOv2", make.dpt_with_backbone, "backbone"),
        ("UperNet", make.upernet, "backbone"),
        **_SIZES,
    ),
    *_of(
        "DINOv2 with registers (transformers)",
        _D,
        5,
        *_heads("Dinov2WithRegisters", "dinov2_with_registers", "ForImageClassification"),
        (
            "Dinov2WithRegistersBackbone",
            lambda: transformers.Dinov2WithRegistersBackbone(make.backbone("Dinov2WithRegistersConfig")),
            "",
        ),
        **_SIZES,
    ),
    *_of(
        "DINOv3 ViT (transformers)",
        "model.layer.{}.attention",
        5,
        *_heads("DINOv3ViT", "dinov3_vit", num_register_tokens=4, use_gated_mlp=True),
        (
            "DINOv3ViTBackbone",
            lambda: transformers.DINOv3ViTBackbone(make.backbone("DINOv3ViTConfig", num_register_tokens=4)),
            "",
        ),
        **_SIZES,
    ),
    *_of(
        "CLIP vision (transformers)",
        _C,
        1,
        ("CLIPVisionModel", make.hf("CLIPVisionModel", "CLIPVisionConfig"), ""),
        ("CLIPVisionModelWithProjection", make.hf("CLIPVisionModelWithProjection", "CLIPVisionConfig"), "vision_model"),
        (
            "CLIPForImageClassification",
            make.two_towers("CLIPForImageClassification", "CLIPConfig", "CLIPVisionConfig", "CLIPTextConfig"),
            "vision_model",
            _FIXED,
        ),
        (
            "CLIPModel",
            make.two_towers("CLIPModel", "CLIPConfig", "CLIPVisionConfig", "CLIPTextConfig"),
            "vision_model",
            {"inputs": make.text},
        ),
        ("Llava", make.llava, "model.vision_tower", {"inputs": make.image_tokens, **_FIXED}),
        **_FLAG,
    ),
    *_of(
        "MetaCLIP 2 vision (transformers)",
        _C,
        1,
        ("MetaClip2VisionModel", make.hf("MetaClip2VisionModel", "MetaClip2VisionConfig"), ""),
        (
            "MetaClip2Model",
            make.two_towers("MetaClip2Model", "MetaClip2Config", "MetaClip2VisionConfig", "MetaClip2TextConfig"),
            "vision_model",
            {"inputs": make.text},
        ),
        **_FLAG,
    ),
    *_of(
        "SigLIP vision (transformers)",
        _C,
        0,
        ("SiglipVisionModel", make.hf("SiglipVisionModel", "SiglipVisionConfig"), ""),
        (
            "SiglipForImageClassification",
            make.two_towers("SiglipForImageClassification", "SiglipConfig", "SiglipVisionConfig", "SiglipTextConfig"),
            "vision_model",
        ),
        (
            "SiglipModel",
            make.two_towers("SiglipModel", "SiglipConfig", "SiglipVisionConfig", "SiglipTextConfig"),
            "vision_model",
            {"inputs": make.text},
        ),
        **_FLAG,
    ),
    *_of(
        "AIMv2 vision (transformers)",
        "encoder.layers.{}.attention",
        0,
        ("Aimv2VisionModel", make.hf("Aimv2VisionModel", "Aimv2VisionConfig", is_native=True), "", _SIZES),
        (
            "Aimv2Model",
            make.two_towers("Aimv2Model", "Aimv2Config", "Aimv2VisionConfig", "Aimv2TextConfig"),
            "vision_model",
            {"inputs": make.text},
        ),
    ),
    *_of(
        "YOLOS (transformers)",
        _O,
        1,
        *_heads(
            "Yolos",
            "vit",
            "ForObjectDetection",
            image_size=[32, 32],
            num_detection_tokens=3,
        ),
        (
            "Yolos, no positions between blocks",
            make.hf(
                "YolosModel",
                "YolosConfig",
                image_size=[32, 32],
                num_detection_tokens=3,
                use_mid_position_embeddings=False,
            ),
            "",
        ),
        suffix=3,
        **_SIZES,
    ),
    *_of(
        "DPT (transformers)",
        _O,
        1,
        *_heads("DPT", "dpt", "ForDepthEstimation", "ForSemanticSegmentation", **make.DPT, use_auxiliary_head=False),
        seed=3,  # the depths of some others are all below zero, where the last ReLU is
    ),
    *_of(
        "Pixio (transformers)",
        _V,
        4,
        ("PixioModel", make.hf("PixioModel", "PixioConfig", n_cls_tokens=4, mlp_ratio=2), ""),
        (
            "PixioBackbone",
            lambda: transformers.PixioBackbone(make.backbone("PixioConfig", n_cls_tokens=4, mlp_ratio=2)),
            "pixio",
        ),
        **_SIZES,
    ),
    *_of(
        "ViTPose backbone (transformers)",
        _O,
        0,
        (
            "VitPoseBackbone",
            make.hf(
                "VitPoseBackbone",
                "VitPoseBackboneConfig",
                image_size=[32, 16],
                patch_size=[8, 8],
                mlp_ratio=2,
                out_features=["stage2", "stage6"],
            ),
            "",
        ),
        ("VitPoseForPoseEstimation", make.vitpose, "backbone"),
        size=(32, 16),
    ),
    *_of(
        "VisionTransformer (timm)",
        "blocks.{}.attn",
        1,
        ("timm vit", make.timm_model("vit_tiny_patch16_224"), ""),
        ("timm vit, dynamic size", make.timm_model("vit_tiny_patch16_224", dynamic_img_size=True), "", _SIZES),
        ("timm vit, wide", make.timm_model("vit_tiny_patch16_224", img_size=(16, 32)), "", _WIDE),
        (
            "timm vit, registers",
            make.timm_model("vit_small_patch14_reg4_dinov2", init_values=0.1, dynamic_img_size=True),
            "",
            {"prefix": 5, **_SIZES},
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
    *_of(
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
        **_SIZES,
    ),
    *_of(
        "VisionTransformerDistilled (timm)",
        "blocks.{}.attn",
        2,
        ("timm deit, distilled", make.timm_model("deit_tiny_distilled_patch16_224"), ""),
    ),
    *_of(
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
            _WIDE,
        ),
    ),
    *_of(
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
        ("timm eva", make.timm_model("eva_giant_patch14_224"), "", _FIXED),
        **_SIZES,
    ),
    *_of(
        "EVA with post-norm (timm)",
        "blocks.{}.attn",
        1,
        (
            "timm eva, post-norm",
            make.timm_model("eva02_tiny_patch14_224", use_post_norm=True, dynamic_img_size=True),
            "",
        ),
        **_SIZES,
    ),
    *_of(
        "relative position (timm)",
        "blocks.{}.attn",
        0,
        ("timm relpos", make.timm_model("vit_relpos_small_patch16_224"), ""),
        ("timm relpos, class token", make.timm_model("vit_relpos_base_patch16_cls_224"), "", {"prefix": 1}),
        ("timm relpos, shared", make.timm_model("vit_srelpos_small_patch16_224", img_size=(16, 32)), "", _WIDE),
    ),
    *_of(
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
]

LEADS: list[Case] = list({case.family: case for case in reversed(CASES)}.values())[::-1]


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)
