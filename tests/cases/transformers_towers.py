"""Of transformers: vision models, and those of two towers."""

from __future__ import annotations

import small_models as make
import transformers

from .case import Case
from .making import (
    FIXED,
    FLAG,
    SHAPE_C,
    SHAPE_D,
    SHAPE_O,
    SHAPE_V,
    SIZES,
    VIDEO,
    WIDE,
    cases_of,
    heads,
)

_BEIT = {"use_relative_position_bias": True, "use_mask_token": True, "layer_scale_init_value": 0.1}
_BEIT_HEAD = {**_BEIT, "out_indices": [1, 2, 4, 5], "pool_scales": [1, 2], "use_auxiliary_head": False}
_SAPIENS = {"num_register_tokens": 2, "num_key_value_heads_per_layer": [4, 2, 4, 2, 1, 4]}
_SAPIENS_HEAD = {"upsample_out_channels": [8, 8], "conv_out_channels": [8]}
_EOMT = {"num_hidden_layers": 8, "num_blocks": 2, "num_queries": 3, "num_upscale_blocks": 1}  # queries join at block 6

CASES: list[Case] = [
    *cases_of(
        "ViT and DINO (transformers)",
        SHAPE_V,
        1,
        *heads("ViT", "vit", "ForImageClassification"),
        ("ViTForMaskedImageModeling", make.hf("ViTForMaskedImageModeling", "ViTConfig"), "vit", FIXED),
        (
            "ViT, wide",
            make.hf("ViTForImageClassification", "ViTConfig", image_size=(16, 32)),
            "vit",
            {**WIDE, **FIXED},
        ),
        **FLAG,
    ),
    *cases_of(
        "DeiT (transformers)",
        SHAPE_V,
        2,
        *heads("DeiT", "deit", "ForImageClassification", "ForImageClassificationWithTeacher"),
        ("DeiTForMaskedImageModeling", make.hf("DeiTForMaskedImageModeling", "DeiTConfig"), "deit", FIXED),
        **FLAG,
    ),
    *cases_of("ViTMSN (transformers)", SHAPE_V, 1, *heads("ViTMSN", "vit", "ForImageClassification"), **FLAG),
    *cases_of("I-JEPA (transformers)", SHAPE_V, 0, *heads("IJepa", "ijepa", "ForImageClassification"), **FLAG),
    *cases_of(
        "BEiT (transformers)",
        SHAPE_V,
        1,
        *heads("Beit", "beit", "ForImageClassification", "ForMaskedImageModeling", vocab_size=20, **_BEIT),
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
        **SIZES,
    ),
    *cases_of(
        "DINOv2 (transformers)",
        SHAPE_D,
        1,
        *heads("Dinov2", "dinov2", "ForImageClassification"),
        ("Dinov2, gated MLP", make.hf("Dinov2Model", "Dinov2Config", use_swiglu_ffn=True), ""),
        ("Dinov2Backbone", lambda: transformers.Dinov2Backbone(make.backbone("Dinov2Config")), ""),
        ("DepthAnything", make.depth_anything, "backbone"),
        ("DPT with DINOv2", make.dpt_with_backbone, "backbone"),
        ("UperNet", make.upernet, "backbone"),
        **SIZES,
    ),
    *cases_of(
        "DINOv2 with registers (transformers)",
        SHAPE_D,
        5,
        *heads("Dinov2WithRegisters", "dinov2_with_registers", "ForImageClassification"),
        (
            "Dinov2WithRegistersBackbone",
            lambda: transformers.Dinov2WithRegistersBackbone(make.backbone("Dinov2WithRegistersConfig")),
            "",
        ),
        **SIZES,
    ),
    *cases_of(
        "DINOv3 ViT (transformers)",
        "model.layer.{}.attention",
        5,
        *heads("DINOv3ViT", "dinov3_vit", num_register_tokens=4, use_gated_mlp=True),
        (
            "DINOv3ViTBackbone",
            lambda: transformers.DINOv3ViTBackbone(make.backbone("DINOv3ViTConfig", num_register_tokens=4)),
            "",
        ),
        **SIZES,
    ),
    *cases_of(
        "CLIP vision (transformers)",
        SHAPE_C,
        1,
        ("CLIPVisionModel", make.hf("CLIPVisionModel", "CLIPVisionConfig"), ""),
        ("CLIPVisionModelWithProjection", make.hf("CLIPVisionModelWithProjection", "CLIPVisionConfig"), "vision_model"),
        (
            "CLIPForImageClassification",
            make.two_towers("CLIPForImageClassification", "CLIPConfig", "CLIPVisionConfig", "CLIPTextConfig"),
            "vision_model",
            FIXED,
        ),
        (
            "CLIPModel",
            make.two_towers("CLIPModel", "CLIPConfig", "CLIPVisionConfig", "CLIPTextConfig"),
            "vision_model",
            {"inputs": make.text},
        ),
        ("Llava", make.llava, "model.vision_tower", {"inputs": make.image_tokens, **FIXED}),
        **FLAG,
    ),
    *cases_of(
        "MetaCLIP 2 vision (transformers)",
        SHAPE_C,
        1,
        ("MetaClip2VisionModel", make.hf("MetaClip2VisionModel", "MetaClip2VisionConfig"), ""),
        (
            "MetaClip2Model",
            make.two_towers("MetaClip2Model", "MetaClip2Config", "MetaClip2VisionConfig", "MetaClip2TextConfig"),
            "vision_model",
            {"inputs": make.text},
        ),
        **FLAG,
    ),
    *cases_of(
        "SigLIP vision (transformers)",
        SHAPE_C,
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
        **FLAG,
    ),
    *cases_of(
        "AIMv2 vision (transformers)",
        "encoder.layers.{}.attention",
        0,
        ("Aimv2VisionModel", make.hf("Aimv2VisionModel", "Aimv2VisionConfig", is_native=True), "", SIZES),
        (
            "Aimv2Model",
            make.two_towers("Aimv2Model", "Aimv2Config", "Aimv2VisionConfig", "Aimv2TextConfig"),
            "vision_model",
            {"inputs": make.text},
        ),
    ),
    *cases_of(
        "YOLOS (transformers)",
        SHAPE_O,
        1,
        *heads(
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
        **SIZES,
    ),
    *cases_of(
        "DPT (transformers)",
        SHAPE_O,
        1,
        *heads("DPT", "dpt", "ForDepthEstimation", "ForSemanticSegmentation", **make.DPT, use_auxiliary_head=False),
        seed=3,  # the depths of some others are all below zero, where the last ReLU is
    ),
    *cases_of(
        "Pixio (transformers)",
        SHAPE_V,
        4,
        ("PixioModel", make.hf("PixioModel", "PixioConfig", n_cls_tokens=4, mlp_ratio=2), ""),
        (
            "PixioBackbone",
            lambda: transformers.PixioBackbone(make.backbone("PixioConfig", n_cls_tokens=4, mlp_ratio=2)),
            "pixio",
        ),
        **SIZES,
    ),
    *cases_of(
        "ViTPose backbone (transformers)",
        SHAPE_O,
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
    *cases_of(
        "VideoMAE (transformers)",
        SHAPE_O,
        0,
        *heads("VideoMAE", "videomae", "ForVideoClassification", num_frames=4),
        ("VideoMAE, last norm", make.hf("VideoMAEModel", "VideoMAEConfig", num_frames=4, use_mean_pooling=False), ""),
        (
            "VideoMAE, wide",
            make.hf("VideoMAEModel", "VideoMAEConfig", num_frames=6, image_size=[16, 32]),
            "",
            {"size": (6, 16, 32)},
        ),
        **VIDEO,
    ),
    *cases_of(
        "ViViT (transformers)",
        SHAPE_V,
        1,
        *heads("Vivit", "vivit", "ForVideoClassification", num_frames=4, tubelet_size=[2, 8, 8]),
        **VIDEO,
    ),
    *cases_of(
        "V-JEPA 2 (transformers)",
        "layer.{}.attention",
        0,
        ("VJEPA2ForVideoClassification", make.vjepa2("VJEPA2ForVideoClassification"), "vjepa2.encoder"),
        ("VJEPA2Model", make.vjepa2("VJEPA2Model"), "encoder"),
        given=make.videos,
        others=((2, 32, 32), (6, 16, 32)),
        **VIDEO,
    ),
    *cases_of(
        "TIPSv2 vision (transformers)",
        SHAPE_D,
        3,
        ("Tipsv2VisionModel", make.hf("Tipsv2VisionModel", "Tipsv2VisionConfig", num_register_tokens=2), ""),
        (
            "Tipsv2VisionBackbone",
            lambda: transformers.Tipsv2VisionBackbone(make.backbone("Tipsv2VisionConfig", num_register_tokens=2)),
            "",
        ),
        *(
            (
                f"Tipsv2DptFor{head}",
                make.tipsv2_dpt(f"Tipsv2DptFor{head}"),
                "backbone",
                {"others": ()},
            )
            for head in ("DepthEstimation", "SemanticSegmentation")
        ),
        (
            "Tipsv2Model",
            make.holding(
                "Tipsv2Model", "Tipsv2Config", vision_config={"num_register_tokens": 2}, text_config=make.TEXT
            ),
            "vision_model",
            {"inputs": make.text},
        ),
        **SIZES,
    ),
    *cases_of(
        "RADIO (transformers)",
        SHAPE_D,
        5,
        ("RadioModel", make.hf("RadioModel", "RadioConfig", max_img_size=64, num_registers=2), ""),
        **SIZES,
    ),
    *cases_of(
        "Sapiens 2 (transformers)",
        "model.layer.{}.attention",
        3,
        ("Sapiens2Model", make.hf("Sapiens2Model", "Sapiens2Config", **_SAPIENS), ""),
        ("Sapiens2Backbone", lambda: transformers.Sapiens2Backbone(make.backbone("Sapiens2Config", **_SAPIENS)), ""),
        *(
            (
                f"Sapiens2For{head}",
                make.hf(f"Sapiens2For{head}", "Sapiens2Config", **_SAPIENS, head_config=_SAPIENS_HEAD),
                "model",
            )
            for head in ("SemanticSegmentation", "PoseEstimation", "NormalEstimation")
        ),
        **SIZES,
    ),
    *cases_of(
        "Audio Spectrogram Transformer (transformers)",
        SHAPE_V,
        2,
        *(
            (name, make.hf(name, "ASTConfig", max_length=32, num_mel_bins=20, frequency_stride=4, time_stride=6), path)
            for name, path in (("ASTModel", ""), ("ASTForAudioClassification", "audio_spectrogram_transformer"))
        ),
        given=make.spectrograms,
        size=(20, 32),
        strides=(4, 6),
    ),
    *(
        case
        for family, model, config, given in (
            ("EoMT", "EomtForUniversalSegmentation", "EomtConfig", make.pixels),
            ("EoMT with DINOv3", "EomtDinov3ForUniversalSegmentation", "EomtDinov3Config", make.pixels),
            ("VidEoMT", "VideomtForUniversalSegmentation", "VideomtConfig", make.videos_of_one_frame),
        )
        for case in cases_of(
            f"{family} (transformers)",
            "layers.{}.attention",
            5,
            (model, make.hf(model, config, **_EOMT), "", {"given": given}),
        )
    ),
]
