"""Of hosts whose images have a grid each, and the inputs that they are called with.

Of a batch of images, the even ones lose their last column of patches and the odd ones the lower half of their rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import small_models as make
import torch
from torch import Tensor

from .case import Case
from .making import cases_of

SIDE = 8


def sizes_of(images: Tensor, side: int = SIDE) -> Tensor:
    """(B, 2), the grid of each image. Made without a loop, so that it may be recorded."""
    rows, columns = images.shape[-2] // side, images.shape[-1] // side
    sides = [torch.full((), length) for length in (rows, columns - 1, rows // 2, columns)]
    return torch.stack(sides).view(2, 2)[torch.arange(images.shape[0]) % 2]


def real_of(images: Tensor) -> Tensor:
    """(B, N), which places are patches."""
    count = (images.shape[-2] // SIDE) * (images.shape[-1] // SIDE)
    return torch.arange(count) < sizes_of(images).prod(dim=1, keepdim=True)


def patches_of(images: Tensor) -> Tensor:
    """(B, N, 8·8·3), the patches of each image row by row, as far as its grid goes, and others behind them."""
    rows, columns = images.shape[-2] // SIDE, images.shape[-1] // SIDE
    cut = images[..., : rows * SIDE, : columns * SIDE]
    cells = (
        cut.reshape(images.shape[0], 3, rows, SIDE, columns, SIDE).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    )
    width, places = sizes_of(images)[:, 1:], torch.arange(rows * columns)
    index = (places // width * columns + places % width) % (rows * columns)
    return torch.take_along_dim(cells, index[..., None], dim=1)


def siglip2(images: Tensor) -> dict[str, Tensor]:
    """The inputs of SigLIP 2."""
    return {
        "pixel_values": patches_of(images),
        "spatial_shapes": sizes_of(images),
        "pixel_attention_mask": real_of(images).int(),
    }


def naflex(images: Tensor) -> dict[str, Tensor]:
    """The inputs of timm's NaFlexViT, as its collator makes them."""
    width, places, real = sizes_of(images)[:, 1:], torch.arange(patches_of(images).shape[1]), real_of(images)
    places_of = torch.stack([places // width, places % width], dim=-1)
    return {"patches": patches_of(images), "patch_coord": places_of * real[..., None], "patch_valid": real}


def _naflex(model: str, **differs: Any) -> Any:
    return make.timm_model(f"naflexvit_base_patch16_{model}", pos_embed_grid_size=(4, 4), img_size=None, **differs)


def even_sizes_of(images: Tensor, side: int = SIDE) -> Tensor:
    """(B, 2), the grid of each image, of even sides: without the last two columns, or the lower half of the rows."""
    rows, columns = images.shape[-2] // side, images.shape[-1] // side
    sides = [torch.full((), length) for length in (rows, columns - 2, rows // 2, columns)]
    return torch.stack(sides).view(2, 2)[torch.arange(images.shape[0]) % 2]


def qwen(
    images: Tensor,
    side: int = SIDE,
    name: str = "hidden_states",
    grid: str = "grid_thw",
    merge: int = 2,
    shown: int = 2,
) -> dict[str, Tensor]:
    """The inputs of Qwen's towers: 2×2 patches together, each for two frames, image after image."""
    sizes, patches = even_sizes_of(images, side), []
    for image, (rows, columns) in zip(images, sizes.tolist(), strict=True):
        for row, column in packed_order(rows, columns, merge):
            patch = image[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
            patches.append(torch.stack([patch] * shown, dim=1).flatten())
    frames = torch.ones(len(sizes), 1, dtype=torch.long)
    return {name: torch.stack(patches), grid: torch.cat([frames, sizes], dim=1)}


def packed_order(rows: int, columns: int, merge: int = 2) -> list[tuple[int, int]]:
    """The places of patches in the order in which they are packed."""
    return [
        (row + down, column + right)
        for row in range(0, rows, merge)
        for column in range(0, columns, merge)
        for down in range(merge)
        for right in range(merge)
    ]


def text_with_places(*counts: int) -> Callable[[int], dict[str, Tensor]]:
    """Texts with places for the tokens of their image, so many in turn."""

    def inputs(batch: int) -> dict[str, Tensor]:
        ids = torch.full((batch, 3 + max(counts)), 5)
        for row in range(batch):
            ids[row, :2] = torch.tensor([1, 10])
            ids[row, 2 : 2 + counts[row % len(counts)]] = 9
        return {"input_ids": ids, "mm_token_type_ids": (ids == 9).int(), "use_cache": False}

    return inputs


def pixtral(images: Tensor) -> dict[str, Tensor]:
    """The inputs of Pixtral: images, of which each fills a part."""
    return {"pixel_values": images, "image_sizes": SIDE * sizes_of(images)}


_SHAPE = {name: value for name, value in make.SHAPE.items() if name != "image_size"}
_SIGLIP2 = {"vision_config": {**_SHAPE, "num_patches": 16}, "text_config": make.TEXT, "num_labels": 5}
_VISION = {"depth": make.DEPTH, "num_heads": 4}
_QWEN2 = {**_VISION, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, "patch_size": 2}
_QWEN3 = {**_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "patch_size": 8}
_QWEN3 |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [1]}
_QWEN3_SHAPE = {
    name: value for name, value in _QWEN3.items() if name not in ("num_position_embeddings", "deepstack_visual_indexes")
}
_MISTRAL3 = {"vision_config": {"model_type": "pixtral"}, "spatial_merge_size": 1, "image_token_index": 9}
_MISTRAL3_INPUTS = {"inputs": text_with_places(12, 8), "others": ()}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
QWEN_TEXT = {
    "text_config": {
        **{name: value for name, value in make.LLAMA.items() if name != "model_type"},
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_parameters": _ROPE,
    },
    "image_token_id": 9,
    "vision_start_token_id": 10,
    "video_token_id": 11,
}
NAMES = {"name": "pixel_values", "grid": "image_grid_thw"}  # by which whole models know them
_PACKED: dict[str, Any] = {"merge": 2}
_LFM2 = {
    "text_config": {
        **make.LLAMA,
        "model_type": "lfm2",
        "num_key_value_heads": 2,
        "layer_types": ["full_attention"] * 2,
    },
    "vision_config": {"model_type": "siglip2_vision_model", "num_patches": 16, "vision_use_head": False},
    "projector_hidden_size": 16,
}
_PADDED: dict[str, Any] = {"sizes": sizes_of, "others": ((16, 64), (64, 16), (48, 40))}

RAGGED: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    (
        (
            "SigLIP 2 vision (transformers)",
            "encoder.layers.{}.self_attn",
            0,
            ("Siglip2VisionModel", make.hf("Siglip2VisionModel", "Siglip2VisionConfig", num_patches=16), ""),
            (
                "Siglip2ForImageClassification",
                make.of("Siglip2ForImageClassification", "Siglip2Config", **_SIGLIP2),
                "vision_model",
            ),
            (
                "Siglip2Model",
                make.of("Siglip2Model", "Siglip2Config", **_SIGLIP2),
                "vision_model",
                {"inputs": make.text},
            ),
        ),
        {"given": siglip2, **_PADDED},
    ),
    (
        (
            "SigLIP 2 vision (transformers)",
            "encoder.layers.{}.self_attn",
            0,
            *(
                (name, make.vision_language(name, "Lfm2VlConfig", **_LFM2), path)
                for name, path in (
                    ("Lfm2VlModel", "vision_tower"),
                    ("Lfm2VlForConditionalGeneration", "model.vision_tower"),
                )
            ),
        ),
        {"given": siglip2, "inputs": make.places_for(2), "sizes": sizes_of},
    ),
    (
        (
            "Qwen2-VL vision (transformers)",
            "blocks.{}.attn",
            0,
            *(
                (name, make.of(name, "Qwen2VLConfig", vision_config=_QWEN2, **QWEN_TEXT), path)
                for name, path in (("Qwen2VLModel", "visual"), ("Qwen2VLForConditionalGeneration", "model.visual"))
            ),
        ),
        {
            **_PACKED,
            "patch": 2,
            "sizes": partial(even_sizes_of, side=2),
            "given": partial(qwen, side=2, **NAMES),
            "inputs": text_with_places(56, 32),
        },
    ),
    (
        (
            "Qwen3-VL vision (transformers)",
            "blocks.{}.attn",
            0,
            (
                "Qwen3VLVisionModel",
                make.of("Qwen3VLVisionModel", "Qwen3VLVisionConfig", **_QWEN3),
                "",
                {"given": qwen, "inputs": make.nothing, "others": ((32, 64), (64, 32))},
            ),
            *(
                (name, make.of(name, "Qwen3VLConfig", vision_config=_QWEN3, **QWEN_TEXT), path)
                for name, path in (("Qwen3VLModel", "visual"), ("Qwen3VLForConditionalGeneration", "model.visual"))
            ),
        ),
        {**_PACKED, "sizes": even_sizes_of, "given": partial(qwen, **NAMES), "inputs": text_with_places(2, 2)},
    ),
    *(
        (
            (
                f"{family} vision (transformers)",
                "blocks.{}.attn",
                0,
                (f"{name}VisionModel", make.of(f"{name}VisionModel", f"{name}VisionConfig", **shape), ""),
            ),
            {**_PACKED, "sizes": even_sizes_of, "given": qwen, "others": ((32, 64), (64, 32))},
        )
        for family, name, shape in (
            ("Qwen3-VL-MoE", "Qwen3VLMoe", _QWEN3),
            ("Qwen3.5", "Qwen3_5", {**_QWEN3_SHAPE, "num_position_embeddings": 16}),
            ("Qwen3.5-MoE", "Qwen3_5Moe", {**_QWEN3_SHAPE, "num_position_embeddings": 16}),
            ("GLM-4V", "Glm4v", {**_QWEN3_SHAPE, "image_size": 32}),
        )
    ),
    (
        (
            "Pixtral vision (transformers)",
            "transformer.layers.{}.attention",
            0,
            ("PixtralVisionModel", make.hf("PixtralVisionModel", "PixtralVisionConfig"), ""),
            *(
                (name, make.vision_language(name, "Mistral3Config", **_MISTRAL3), path, _MISTRAL3_INPUTS)
                for name, path in (
                    ("Mistral3Model", "vision_tower"),
                    ("Mistral3ForConditionalGeneration", "model.vision_tower"),
                )
            ),
        ),
        {"merge": 1, "sizes": sizes_of, "given": pixtral, "others": ((16, 64), (64, 16), (48, 40))},
    ),
    *(
        ((family, "blocks.{}.attn", prefix, (name, _naflex(model, **differs), "")), {"given": naflex, **_PADDED})
        for family, name, prefix, model, differs in (
            ("NaFlexViT (timm)", "timm naflex, patches", 5, "gap", {"class_token": True}),
            ("NaFlexViT (timm)", "timm naflex, patches, no prefix", 0, "map", {"reg_tokens": 0}),
            ("NaFlexViT with rope (timm)", "timm naflex, patches, rope", 4, "gap", {"rope_type": "axial"}),
            ("NaFlexViT with rope (timm)", "timm naflex, patches, mixed rope", 4, "gap", {"rope_type": "mixed"}),
        )
    ),
]

CASES: list[Case] = [case for args, differs in RAGGED for case in cases_of(*args, **differs)]
