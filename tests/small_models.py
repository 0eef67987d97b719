"""Builders of small models of every host, from configs, with random weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network

import timm
import torch
import torchvision
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


def softmax(x: Tensor, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """torch's, but for the dtype, to which transformers' eager attention rounds."""
    return x.softmax(dim)


def rms_norm(self: Any, x: Tensor) -> Tensor:
    """That of Sapiens 2, which rounds to float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * wide.to(x.dtype)


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The rotary embedding of MLCD, which rounds to float32."""

    def rotate(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        first, second = wide.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return (wide * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)).to(x.dtype)

    return rotate(q), rotate(k)


def gemma_rotation(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, N, d) of places (B, N, 2) in timm's Gemma 4, which rounds to float32."""
    angles = position_ids[..., None] * self.inv_freq.to(x.dtype)
    angles = torch.cat([angles, angles], dim=-1).flatten(2)
    return angles.cos(), angles.sin()


ROTATING = (
    "mlcd",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen2_5_omni",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_omni_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen4_exp",
    "cohere_compass",
    "glm4v",
    "glm4v_moe",
    "glm_ocr",
    "glm5_next",
    "ernie4_5_vl_moe",
    "dots3_note",
    "exaone4_5",
)
# What hosts round to float32, whatever the model is in, and the same without that.
EXACT: dict[str, Callable[..., Any]] = {
    "torch.nn.functional.softmax": softmax,
    "timm.models.gemma4_vit.Gemma4RotaryEmbedding2D.forward": gemma_rotation,
    "transformers.models.sapiens2.modeling_sapiens2.Sapiens2RMSNorm.forward": rms_norm,
    "transformers.models.pixtral.modeling_pixtral.PixtralRMSNorm.forward": rms_norm,
    **{
        f"transformers.models.{name}.modeling_{name}.{prefix}RMSNorm.forward": rms_norm
        for name, prefix in (
            ("glm4v", "Glm4v"),
            ("glm4v_moe", "Glm4vMoe"),
            ("glm_ocr", "GlmOcr"),
            ("glm5_next", "Glm5Next"),
            ("dots3_note", "Dots3Note"),
            ("qwen2_5_vl", "Qwen2_5_VL"),
            ("qwen2_5_omni", "Qwen2_5Omni"),
            ("exaone4_5", "Exaone4_5_"),
        )
    },
    **{f"transformers.models.{name}.modeling_{name}.apply_rotary_pos_emb_vision": rotated for name in ROTATING},
}


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in the wider precision of the two, of which a host may have rounded one."""
    wide = torch.promote_types(a.dtype, b.dtype)
    return torch.matmul(a.to(wide), b.to(wide))


# The same by the way in which most hosts round: in these tests ``Tensor.float`` makes float64.
EXACT_STEPS: dict[str, Callable[..., Any]] = {
    "torch.Tensor.float": Tensor.double,
    "torch.Tensor.__matmul__": product,
}


def hf(model: str, config: str, **kwargs: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        settings = getattr(transformers, config)(**{**SHAPE, "num_labels": 5, "encoder_stride": 8, **kwargs})
        return getattr(transformers, model)(settings)

    return build


def of(model: str, config: str, **kwargs: Any) -> Callable[[], nn.Module]:
    """A model of a config that has no shape of its own."""
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**kwargs))


def two_towers(model: str, config: str, vision: str, text: str, **kwargs: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        text_config = getattr(transformers, text)(**TEXT)
        vision_config = getattr(transformers, vision)(**SHAPE, projection_dim=16)
        settings = getattr(transformers, config)(
            **{"projection_dim": 16, **kwargs},
            text_config=text_config.to_dict(),
            vision_config=vision_config.to_dict(),
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


def tipsv2_dpt(model: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        inner = backbone("Tipsv2VisionConfig", num_register_tokens=2, reshape_hidden_states=False)
        sizes = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "num_depth_bins": 6, "num_labels": 5}
        return getattr(transformers, model)(transformers.Tipsv2DptConfig(backbone_config=inner, **sizes))

    return build


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


LLAMA = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"intermediate_size": 48, "vocab_size": 50}


def vision_language(model: str, config: str, experts: str | None = None, **kwargs: Any) -> Callable[[], nn.Module]:
    """A model of images and text, whose image token is 9; `vision_config` adds to the shape."""

    def build() -> nn.Module:
        given = {"text_config": LLAMA, "image_token_id": 9, **kwargs}
        given["vision_config"] = {**SHAPE, **kwargs.get("vision_config", {})}
        built = getattr(transformers, model)(getattr(transformers, config)(**given))
        if experts is not None:
            built.set_experts_implementation(experts)
        return built

    return build


def places_for(count: int) -> Callable[[int], dict[str, Tensor]]:
    """A text with places for the tokens of an image."""
    return lambda batch: {"input_ids": torch.tensor([1] + [9] * count + [4, 5]).repeat(batch, 1)}


def tiles(batch: int) -> dict[str, Tensor]:
    """A text with places for the tokens of an image of one tile."""
    return {**places_for(4)(batch), "pixel_attention_mask": torch.ones(batch, 1, dtype=torch.bool)}


def pixels(images: Tensor) -> dict[str, Tensor]:
    """The images under the name that nearly all models have for them."""
    return {"pixel_values": images}


def videos(images: Tensor) -> dict[str, Tensor]:
    """Videos, by V-JEPA 2's name."""
    return {"pixel_values_videos": images}


def listed(images: Tensor) -> dict[str, Tensor]:
    """One image in the list that belongs to each text."""
    return {"pixel_values": images[:, None]}


def twice(images: Tensor) -> dict[str, Tensor]:
    """An image as a whole, and as its only crop."""
    return {"image_pixel_values": torch.stack([images, images], dim=1)}


def padded(name: str, side: int = 1) -> Callable[[int], dict[str, Tensor]]:
    """A mask (B, 4·side, 4·side) that says how much of each grid of 4×4 patches is image: another part for each."""
    sizes = [(4, 3), (2, 4)]  # two, as two processes that share a batch of four have two images each

    def inputs(batch: int) -> dict[str, Tensor]:
        mask = torch.zeros(batch, 4 * side, 4 * side, dtype=torch.bool)
        for index in range(batch):
            rows, columns = sizes[index % len(sizes)]
            mask[index, : rows * side, : columns * side] = True
        return {name: mask}

    return inputs


def padded_list(batch: int) -> dict[str, Tensor]:
    """A text with places for the tokens of an image, padded, in the list that belongs to it."""
    mask = padded("pixel_attention_mask", 8)(batch)
    return {**places_for(4)(batch), "pixel_attention_mask": mask["pixel_attention_mask"][:, None]}


def padded_with_text(batch: int) -> dict[str, Tensor]:
    """A text with places for the tokens of an image, padded."""
    return {**places_for(4)(batch), **padded("pixel_mask", 8)(batch)}


def phi4(model: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        audio = {"hidden_size": 32, "intermediate_size": 48, "num_blocks": 1, "num_attention_heads": 4}
        audio |= {"ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 8}
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 2}
        config = transformers.Phi4MultimodalConfig(
            **{name: value for name, value in LLAMA.items() if name != "model_type"},
            **special,
            vision_config={**SHAPE, "crop_size": 32, "image_token_id": 9},
            audio_config={**audio, "audio_token_id": 10},
        )
        return getattr(transformers, model)(config)

    return build


def phi4_vision() -> nn.Module:
    """Its weights start at unit scale, from where a training step leads anywhere."""
    model = hf("Phi4MultimodalVisionModel", "Phi4MultimodalVisionConfig")()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.1 if parameter.ndim > 1 else 1)
    return model


def crops(batch: int) -> dict[str, Tensor]:
    """What belongs to an image, padded, and its only crop, which is not."""
    whole = padded("mask")(batch)["mask"]
    mask = torch.stack([whole, torch.ones_like(whole)], dim=1)
    return {**places_for(13)(batch), "image_attention_mask": mask, "image_sizes": torch.full((batch, 2), 32)}


def idefics(model: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        text = {name: value for name, value in LLAMA.items() if name != "model_type"}
        frozen = {"freeze_text_layers": False, "freeze_vision_layers": False, "alpha_initializer": "ones"}
        shape = {**SHAPE, "embed_dim": SHAPE["hidden_size"]}
        return getattr(transformers, model)(transformers.IdeficsConfig(**text, **frozen, vision_config=shape))

    return build


def one_image(batch: int) -> dict[str, Tensor]:
    """A text that attends to an image."""
    return {**text(batch), "image_attention_mask": torch.ones(batch, 5, 1)}


def image_tokens(batch: int) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([1] + [9] * 16 + [4, 5]).repeat(batch, 1)}


def vjepa2(model: str) -> Callable[[], nn.Module]:
    predictor = {"pred_hidden_size": 16, "pred_num_hidden_layers": 2, "pred_num_attention_heads": 2}
    pooler = {"num_pooler_layers": 1, "mlp_ratio": 1.5}
    return hf(model, "VJEPA2Config", crop_size=32, frames_per_clip=4, **predictor, **pooler)


def timm_model(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": DEPTH, "num_heads": 4, "mlp_ratio": 1.5}
    settings = {"num_classes": 5, **shape, **kwargs}
    return lambda: timm.create_model(name, **{key: value for key, value in settings.items() if value is not None})


def timm_hiera(name: str, **settings: Any) -> Callable[[], nn.Module]:
    """Of Hiera or HieraDet."""

    def build() -> nn.Module:
        model = timm.create_model(name, **settings)
        if hasattr(model, "head"):
            nn.init.normal_(model.head.fc.weight)  # which starts at zero
        return model

    return build


GEMMA4 = {"img_size": 48, "num_heads": 2, "head_dim": 8, "position_embedding_size": 64}
GEMMA4 = {**GEMMA4, "mlp_ratio": None, "intermediate_size": 48}


def torchvision_vit(**kwargs: Any) -> nn.Module:
    shape = {"image_size": 32, "patch_size": 8, "num_layers": DEPTH, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 48}
    model = torchvision.models.VisionTransformer(**shape, num_classes=5, **kwargs)
    nn.init.normal_(model.heads.head.weight)  # which starts at zero
    return model


def timm_wrapper(model: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": DEPTH, "num_heads": 4}
        config = transformers.TimmWrapperConfig(
            architecture="vit_tiny_patch16_224", model_args=shape, num_labels=5, do_pooling=True
        )
        return getattr(transformers, model)(config)

    return build


QFORMER = {name: value for name, value in TEXT.items() if name not in ("projection_dim", "eos_token_id")}


OPT = {"model_type": "opt", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def holding(model: str, config: str, **parts: Any) -> Callable[[], nn.Module]:
    """A model that holds a vision tower of `SHAPE`, which `vision_config` adds to, and the other parts."""

    def build() -> nn.Module:
        given = {**parts, "vision_config": {**SHAPE, **parts.get("vision_config", {})}}
        whole = getattr(transformers, model)(getattr(transformers, config)(**given))
        if hasattr(whole, "query_tokens"):
            nn.init.normal_(whole.query_tokens)  # zero in a fresh model, where what they give has no direction
        return whole

    return build


def spectrograms(images: Tensor) -> dict[str, Tensor]:
    """One channel, whose rows are frequencies, as AST takes it: times by frequencies."""
    return {"input_values": images[:, 0].mT}


def nothing(batch: int) -> dict[str, Tensor]:
    """No further input."""
    return {}


def uncached_text(batch: int) -> dict[str, Any]:
    """A text without a cache, which a checkpointed decoder would fill twice."""
    return {**text(batch), "use_cache": False}


def question(batch: int) -> dict[str, Tensor]:
    """A text that a decoder, which begins with another, answers."""
    return {**text(batch), "decoder_input_ids": torch.tensor([[3, 4]]).repeat(batch, 1)}


def frames(images: Tensor) -> dict[str, Tensor]:
    """Each image, and that from right to left, as the frames of a video."""
    return {"pixel_values": torch.stack([images, images.flip(-1)], dim=1)}


def queries(count: int, instructed: bool = False) -> Callable[[int], dict[str, Tensor]]:
    """A text with places for the queries of a Q-Former, which may be instructed by another text."""

    def inputs(batch: int) -> dict[str, Tensor]:
        ids = {"input_ids": torch.tensor([9] * count + [4, 5]).repeat(batch, 1)}
        return {**ids, **({"qformer_input_ids": text(batch)["input_ids"]} if instructed else {})}

    return inputs


def masked_queries(batch: int) -> dict[str, Tensor]:
    """A text with places for three queries, and the mask that belongs to it."""
    given = queries(3)(batch)
    return {**given, "attention_mask": torch.ones_like(given["input_ids"])}


def one_query(batch: int) -> dict[str, Tensor]:
    """A text that is nothing but the place of a query: Kosmos-2 makes no causal mask in float64."""
    place = torch.ones(batch, 1, dtype=torch.long)
    return {"input_ids": place, "image_embeds_position_mask": place.bool()}


def videos_of_one_frame(images: Tensor) -> dict[str, Tensor]:
    """Each image as a video, by the name that video models have for them."""
    return {"pixel_values_videos": frames(images)["pixel_values"]}
