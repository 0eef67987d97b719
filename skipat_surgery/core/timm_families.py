"""The families of timm that can be cut, and why others cannot."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .family import Family, Grid, pair
from .map_projections import timm_sam_projections
from .padded_grids import naflex_grids
from .timm_hiera import fixed_size, hiera_projections, pooled, pretrained_size, refuse_units, strided
from .timm_projections import gemma4_attends, gemma4_projections
from .timm_shapes import DROPS, timm_family
from .timm_stage_families import STAGE_FAMILIES


def _naflex_size(tower: Any) -> tuple[int, int, int]:
    """Of the grid that its position embeddings are learned on, else of the images that timm's weights are for."""
    embeds = tower.embeds
    if embeds.pos_embed_grid_size is None:
        return tuple(tower.pretrained_cfg["input_size"])
    height, width = (side * patch for side, patch in zip(embeds.pos_embed_grid_size, embeds.patch_size, strict=True))
    return (embeds.in_chans, height, width)


def _refuse_naflex(tower: Any) -> str | None:
    return DROPS if getattr(tower.patch_drop, "prob", 0.0) else None


def _gemma4_size(tower: Any) -> tuple[int, int, int]:
    """timm's own default, where the encoder of a classifier does not know."""
    size = getattr(tower, "_traits", {}).get("img_size") or (768, 768)
    return (tower.in_chans, *pair(size))


def _gemma4_grid(embeddings: Any, height: int, width: int) -> Grid:
    patch_height, patch_width = embeddings.patch_size
    return height // patch_height, width // patch_width


def _refuse_patches(images: Any, patch_coord: Any = None, patch_valid: Any = None) -> str | None:
    if isinstance(images, Tensor) and images.ndim == 4 and patch_coord is None and patch_valid is None:
        return None
    return (
        "Φ needs one grid of patches for a batch, which patches with coordinates do not tell; give it images of one "
        "size, (B, C, H, W)"
    )


_BLOCK, _EVA_BLOCK = "timm.models.vision_transformer.Block", "timm.models.eva.EvaBlock"
_NAFLEX: dict[str, Any] = {
    "embeddings": "embeds",
    "image_to_grid": lambda embeddings, height, width: tuple(embeddings.dynamic_feat_size((height, width))),
    "image_size": _naflex_size,
    "carriers": ("norm_pre",),
    "refuse": _refuse_naflex,
    "ragged": naflex_grids,
}
_HIERA: dict[str, Any] = {
    "final_norm": None,
    "width": lambda tower: tower.blocks[0].dim_out,
    "num_prefix_tokens": lambda tower: 0,
    "image_to_grid": strided,
    "projections": hiera_projections,
    "attends": lambda attention: True,
    "pooled": pooled,
}
FAMILIES: tuple[Family, ...] = (
    timm_family("VisionTransformer", "vision_transformer", "VisionTransformer", _BLOCK),
    timm_family(
        "VisionTransformer with res-post",
        "vision_transformer",
        "VisionTransformer",
        "ResPostBlock",
        post_norm=True,
    ),
    timm_family("VisionTransformerDistilled", "deit", "VisionTransformerDistilled", _BLOCK),
    timm_family("BEiT", "beit", "Beit", "Block"),
    timm_family("EVA/EVA02/DINOv3/rope", "eva", "Eva", "EvaBlock"),
    timm_family("EVA with post-norm", "eva", "Eva", "EvaBlockPostNorm", post_norm=True),
    timm_family("relative position", "vision_transformer_relpos", "VisionTransformerRelPos", "RelPosBlock"),
    timm_family(
        "relative position with res-post",
        "vision_transformer_relpos",
        "VisionTransformerRelPos",
        "ResPostRelPosBlock",
        post_norm=True,
    ),
    # Its class token meets the patches in blocks of their own, after these, and so does the last norm.
    timm_family("CaiT", "cait", "Cait", "LayerScaleBlock", num_prefix_tokens=lambda tower: 0, final_norm=None),
    timm_family("NaFlexViT", "naflexvit", "NaFlexVit", _BLOCK, **_NAFLEX),
    timm_family("NaFlexViT with rope", "naflexvit", "NaFlexVit", _EVA_BLOCK, **_NAFLEX),
    timm_family("Qwen3 ViT", "qwen3_vit", "Qwen3VitEncoder", _EVA_BLOCK, final_norm=None),
    timm_family("DeepSeek ViT", "deepseek_vit", "DeepseekVitEncoder", "DeepseekVitBlock"),
    timm_family(
        "SAM ViT",
        "vision_transformer_sam",
        "VisionTransformerSAM",
        "Block",
        final_norm=None,
        num_prefix_tokens=lambda tower: 0,
        projections=timm_sam_projections,
        maps=True,
    ),
    timm_family("Hiera", "hiera", "Hiera", "HieraBlock", **_HIERA, image_size=fixed_size, refuse=refuse_units),
    timm_family(
        "HieraDet",
        "hieradet_sam2",
        "HieraDet",
        "MultiScaleBlock",
        **_HIERA,
        image_size=pretrained_size,
        refuse=lambda tower: None,
        maps=True,
    ),
    timm_family(
        "Gemma 4 ViT",
        "gemma4_vit",
        "Gemma4VitEncoder",
        "Gemma4Block",
        embeddings="patch_embed",
        final_norm=None,
        image_to_grid=_gemma4_grid,
        image_size=_gemma4_size,
        projections=gemma4_projections,
        attends=gemma4_attends,
        refuse=lambda tower: None,
        refuse_input=_refuse_patches,
    ),
    *STAGE_FAMILIES,
)
_PLAIN = "use a plain VisionTransformer, such as vit_small_patch16_224"
_OR_SWIN = f"{_PLAIN}, or a Swin, whose stages are cut each for itself"
# Modules whose models look close enough to be tried, each with the reason and what to use instead.
REFUSED: dict[str, str] = {
    f"timm.models.{module}.": f"{reason}; {_OR_SWIN}"
    for module, reason in {
        "xcit": "it attends over channels, not over tokens, so there is no MSA to skip",
        "gcvit": "every second of its blocks asks with queries from outside the block, one window's for all windows",
        "mvitv2": "its MSA pools queries, keys and values by convolutions and adds the queries to its output",
        "pvt_v2": "in all stages but the last its keys are of fewer tokens, so that little is left to save",
        "twins": "its attentions are over fewer keys, and in the SVT kind by turns within windows",
        "volo": "its first stage has no keys (outlook attention), and its plain blocks lie behind it in other lists",
    }.items()
} | {
    f"timm.models._features.{name}": "it holds the layers of a convolutional network, or of a Swin, one by one; "
    'a Swin can be cut where timm.create_model(…, features_only=True) is given feature_cls="getter" as well'
    for name in ("FeatureListNet", "FeatureDictNet")
}
