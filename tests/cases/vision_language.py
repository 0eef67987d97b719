"""Of transformers: the vision towers of models of images and text."""

from __future__ import annotations

import small_models as make

from .case import Case
from .making import (
    ALONE,
    FIXED,
    FLAG,
    SHAPE_C,
    SHAPE_V,
    SIZES,
    cases_of,
    two_towers,
    with_text,
)

_KOSMOS_TEXT = {"embed_dim": 32, "layers": 2, "ffn_dim": 48, "attention_heads": 4, "vocab_size": 50}
_KOSMOS = {"text_config": {**_KOSMOS_TEXT, "max_position_embeddings": 32}, "latent_query_num": 1}
_BLIP = {"text_config": make.TEXT, "projection_dim": 16, "vision_config": {"initializer_range": 0.02}}
_BLIP_2 = {"qformer_config": make.QFORMER, "text_config": make.OPT, "num_query_tokens": 3, "image_text_hidden_size": 16}
_BLIP_2_VIDEO = {**_BLIP_2, "video_token_index": 9}
_BLIP_2 |= {"image_token_index": 9}

CASES: list[Case] = [
    *cases_of(
        "InternVL vision (transformers)",
        "encoder.layer.{}.attention",
        1,
        ("InternVLVisionModel", make.hf("InternVLVisionModel", "InternVLVisionConfig"), ""),
        *with_text("InternVL", "vision_tower", inputs=make.places_for(4)),
        **SIZES,
    ),
    *cases_of(
        "Qianfan-OCR vision (transformers)",
        SHAPE_V,
        1,
        ("QianfanOCRVisionModel", make.hf("QianfanOCRVisionModel", "QianfanOCRVisionConfig"), ""),
        *with_text("QianfanOCR", "vision_tower", inputs=make.places_for(4)),
        **SIZES,
    ),
    *cases_of(
        "Janus vision (transformers)",
        SHAPE_C,
        0,
        ("JanusVisionModel", make.hf("JanusVisionModel", "JanusVisionConfig", mlp_ratio=1.5), ""),
        *with_text(
            "Janus",
            "vision_model",
            vision_config={"mlp_ratio": 1.5, "projection_dim": 32},
            vq_config={
                "base_channels": 32,
                "channel_multiplier": [1],
                "embed_dim": 8,
                "image_token_embed_dim": 32,
                "latent_channels": 32,
                "num_embeddings": 20,
                "num_res_blocks": 1,
                "projection_dim": 32,
            },
            inputs=make.places_for(16),
        ),
        **FLAG,
    ),
    *cases_of(
        "Ovis2 vision (transformers)",
        "transformer.encoder.layers.{}.attention",
        0,
        *with_text(
            "Ovis2",
            "vision_tower",
            vision_config={"vocab_size": 20},
            hidden_size=32,
            vocab_size=50,
            visual_indicator_token_ids=[10, 11, 12, 13, 14],
            inputs=make.places_for(16),
        ),
    ),
    *cases_of(
        "Step 3 vision (transformers)",
        "layers.{}.self_attn",
        0,
        ("Step3p7VisionModel", make.hf("Step3p7VisionModel", "Step3p7VisionConfig"), ""),
        *with_text(
            "Step3p7",
            "vision_model",
            text_config={
                **make.LLAMA,
                "head_dim": 8,
                "moe_intermediate_size": 16,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "num_key_value_heads": 2,
                "share_expert_dim": 16,
                "sliding_window": 8,
            },
            inputs=make.places_for(1),
        ),
        **SIZES,
    ),
    *cases_of(
        "Granite-Docling vision (transformers)",
        SHAPE_C,
        0,
        (
            "GraniteDoclingVisionModel",
            make.hf(
                "GraniteDoclingVisionModel",
                "GraniteDoclingVisionConfig",
                out_hidden_size=32,
                scale_factor=2,
                deepstack_visual_indexes=[1, 3],
            ),
            "",
        ),
        *with_text(
            "GraniteDocling",
            "vision_model",
            vision_config={"out_hidden_size": 32, "scale_factor": 2, "deepstack_visual_indexes": [1, 3]},
            text_config={
                **make.LLAMA,
                "num_key_value_heads": 4,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
            inputs=make.tiles,
            given=make.listed,
        ),
        since="transformers 5.24",
    ),
    *cases_of(
        "Idefics vision (transformers)",
        SHAPE_C,
        1,
        ("IdeficsModel", make.idefics("IdeficsModel"), "vision_model"),
        ("IdeficsForVisionText2Text", make.idefics("IdeficsForVisionText2Text"), "model.vision_model"),
        inputs=make.one_image,
        given=make.listed,
        **FLAG,
    ),
    *cases_of(
        "Idefics 2 vision (transformers)",
        SHAPE_C,
        0,
        *with_text(
            "Idefics2",
            "vision_model",
            perceiver_config={
                "hidden_size": 32,
                "num_key_value_heads": 2,
                "resampler_depth": 1,
                "resampler_head_dim": 8,
                "resampler_n_heads": 4,
                "resampler_n_latents": 4,
            },
            inputs=make.padded_list,
            given=make.listed,
        ),
    ),
    *cases_of(
        "Idefics 3 vision (transformers)",
        SHAPE_C,
        0,
        ("Idefics3VisionTransformer", make.hf("Idefics3VisionTransformer", "Idefics3VisionConfig"), "", SIZES),
        (
            "Idefics3VisionTransformer, padded",
            make.hf("Idefics3VisionTransformer", "Idefics3VisionConfig"),
            "",
            {"inputs": make.padded("patch_attention_mask")},
        ),
        *with_text("Idefics3", "vision_model", inputs=make.padded_list, given=make.listed),
        *with_text(
            "Aria",
            "vision_tower",
            text_config={
                **make.LLAMA,
                "model_type": "aria_text",
                "moe_num_experts": 4,
            },
            vision_config={"model_type": "idefics3_vision"},
            projector_patch_to_query_dict={16: 4},
            image_token_index=9,
            experts="eager",  # the others know no float64
            inputs=make.padded_with_text,
        ),
    ),
    *cases_of(
        "SmolVLM vision (transformers)",
        SHAPE_C,
        0,
        ("SmolVLMVisionTransformer", make.hf("SmolVLMVisionTransformer", "SmolVLMVisionConfig"), "", SIZES),
        *with_text("SmolVLM", "vision_model", inputs=make.padded_list, given=make.listed),
    ),
    *cases_of(
        "Phi-4 Multimodal vision (transformers)",
        SHAPE_C,
        0,
        ("Phi4MultimodalVisionModel", make.phi4_vision, "", SIZES),
        (
            "Phi4MultimodalVisionModel, padded",
            make.phi4_vision,
            "",
            {"inputs": make.padded("patch_attention_mask")},
        ),
        *(
            (
                name,
                make.phi4(name),
                f"{inner}embed_tokens_extend.image_embed.img_processor",
                {"inputs": make.crops, "given": make.twice},
            )
            for name, inner in (("Phi4MultimodalModel", ""), ("Phi4MultimodalForCausalLM", "model."))
        ),
    ),
    *cases_of(
        "OWL-ViT vision (transformers)",
        SHAPE_C,
        1,
        *two_towers(
            "OwlViT",
            {"VisionModel": "vision_model", "Model": "vision_model", "ForObjectDetection": "owlvit.vision_model"},
            projection_dim=32,
        ),
        **FLAG,
    ),
    *cases_of(
        "OWLv2 vision (transformers)",
        SHAPE_C,
        1,
        *two_towers(
            "Owlv2",
            {"VisionModel": "vision_model", "Model": "vision_model", "ForObjectDetection": "owlv2.vision_model"},
            projection_dim=32,
        ),
        **FLAG,
    ),
    *cases_of(
        "CLIPSeg vision (transformers)",
        SHAPE_C,
        1,
        *two_towers("CLIPSeg", {"VisionModel": "", "Model": "vision_model"}),
        (
            "CLIPSegForImageSegmentation",
            make.two_towers(
                "CLIPSegForImageSegmentation",
                "CLIPSegConfig",
                "CLIPSegVisionConfig",
                "CLIPSegTextConfig",
                extract_layers=[1, 3, 5],
                reduce_dim=16,
                decoder_intermediate_size=48,
            ),
            "clip.vision_model",
            {"inputs": make.text, "others": ()},
        ),
        **SIZES,
    ),
    *cases_of(
        "Chinese-CLIP vision (transformers)",
        SHAPE_C,
        1,
        *two_towers("ChineseCLIP", {"VisionModel": "", "Model": "vision_model"}),
        **FLAG,
    ),
    *cases_of(
        "AltCLIP vision (transformers)",
        SHAPE_C,
        1,
        *two_towers("AltCLIP", {"VisionModel": "", "Model": "vision_model"}),
        **FLAG,
    ),
    *cases_of(
        "Kosmos-2 vision (transformers)",
        SHAPE_C,
        1,
        *(
            (name, make.holding(name, "Kosmos2Config", **_KOSMOS), "vision_model.model", differs)
            for name, differs in (("Kosmos2ForConditionalGeneration", FIXED), ("Kosmos2Model", {}))
        ),
        inputs=make.one_query,
        **FLAG,
    ),
    *cases_of(
        "GIT vision (transformers)",
        SHAPE_C,
        1,
        ("GitVisionModel", make.hf("GitVisionModel", "GitVisionConfig"), "vision_model"),
        *(
            (
                name,
                make.holding(name, "GitConfig", **{**make.TEXT, "num_hidden_layers": 2}),
                f"{path}image_encoder.vision_model",
                {"inputs": make.uncached_text},
            )
            for name, path in (("GitModel", ""), ("GitForCausalLM", "git."))
        ),
        **FLAG,
    ),
    *cases_of(
        "BLIP vision (transformers)",
        SHAPE_C,
        1,
        ("BlipVisionModel", make.hf("BlipVisionModel", "BlipVisionConfig"), "", ALONE),
        *(
            (name, make.holding(name, "BlipConfig", **_BLIP), "vision_model", differs)
            for name, differs in (
                ("BlipModel", {}),
                ("BlipForConditionalGeneration", {}),
                ("BlipForQuestionAnswering", {"inputs": make.question}),
                ("BlipForImageTextRetrieval", {}),
            )
        ),
        **{**FLAG, "inputs": make.text},
    ),
    *cases_of(
        "BLIP-2 vision (transformers)",
        SHAPE_C,
        1,
        ("Blip2VisionModel", make.hf("Blip2VisionModel", "Blip2VisionConfig"), "", {"inputs": make.nothing}),
        *(
            (name, make.holding(name, "Blip2Config", **_BLIP_2), "vision_model", differs)
            for name, differs in (
                ("Blip2Model", {}),
                ("Blip2ForConditionalGeneration", {}),
                ("Blip2VisionModelWithProjection", {"inputs": make.nothing}),
            )
        ),
        (
            "Blip2ForImageTextRetrieval",
            make.holding(
                "Blip2ForImageTextRetrieval",
                "Blip2Config",
                **{**_BLIP_2, "qformer_config": {**make.QFORMER, "use_qformer_text_input": True}},
            ),
            "vision_model",
            {"inputs": make.masked_queries, **FIXED},
        ),
        inputs=make.queries(3),
        **FLAG,
    ),
    *cases_of(
        "InstructBLIP vision (transformers)",
        SHAPE_C,
        1,
        ("InstructBlipVisionModel", make.hf("InstructBlipVisionModel", "InstructBlipVisionConfig"), "", ALONE),
        *(
            (name, make.holding(name, "InstructBlipConfig", **_BLIP_2), "vision_model")
            for name in ("InstructBlipModel", "InstructBlipForConditionalGeneration")
        ),
        inputs=make.queries(3, instructed=True),
        **FLAG,
    ),
    *cases_of(
        "InstructBLIP-Video vision (transformers)",
        SHAPE_C,
        1,
        (
            "InstructBlipVideoVisionModel",
            make.hf("InstructBlipVideoVisionModel", "InstructBlipVideoVisionConfig"),
            "",
            {**ALONE, "given": make.pixels},
        ),
        *(
            (name, make.holding(name, "InstructBlipVideoConfig", **_BLIP_2_VIDEO), "vision_model")
            for name in ("InstructBlipVideoModel", "InstructBlipVideoForConditionalGeneration")
        ),
        inputs=make.queries(6, instructed=True),
        given=make.frames,
        **FLAG,
    ),
    *cases_of(
        "MLCD vision (transformers)",
        SHAPE_C,
        1,
        ("MLCDVisionModel", make.hf("MLCDVisionModel", "MLCDVisionConfig"), ""),
        **SIZES,
    ),
]
