"""The families of timm that can be cut, and why others cannot."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .family import Family, Grid, pair
from .map_carrying import FirstMapBlock
from .map_projections import timm_sam_projections
from .padded_grids import naflex_grids
from .stage_carrying import NoWindows, TappedWindows, windows_of
from .stages import Stages
from .timm_hiera import fixed_size, hiera_projections, pooled, pretrained_size, refuse_units, strided
from .timm_projections import gemma4_attends, gemma4_projections, timm_attends, timm_projections

_DROPS = "its patch dropout removes tokens in training, so there is no grid; create it with patch_drop_rate=0"


def _grid(tower: Any, height: int, width: int) -> Grid:
    return tuple(tower.patch_embed.dynamic_feat_size((height, width)))


def _image_size(tower: Any) -> tuple[int, int, int]:
    size = tower.patch_embed.img_size or tower.pretrained_cfg["input_size"][1:]
    first = next(module for module in tower.patch_embed.modules() if isinstance(module, nn.Conv2d))
    return (first.in_channels, *pair(size))


def _refuse(tower: Any) -> str | None:
    if getattr(getattr(tower, "patch_drop", None), "prob", 0.0):
        return _DROPS
    if tower.patch_embed.flatten and not tower.patch_embed.strict_img_size:
        return "it flattens patches of any size, so the grid is lost; create it with dynamic_img_size=True"
    return None


def _naflex_size(tower: Any) -> tuple[int, int, int]:
    """Of the grid that its position embeddings are learned on, else of the images that timm's weights are for."""
    embeds = tower.embeds
    if embeds.pos_embed_grid_size is None:
        return tuple(tower.pretrained_cfg["input_size"])
    height, width = (side * patch for side, patch in zip(embeds.pos_embed_grid_size, embeds.patch_size, strict=True))
    return (embeds.in_chans, height, width)


def _refuse_naflex(tower: Any) -> str | None:
    return _DROPS if getattr(tower.patch_drop, "prob", 0.0) else None


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


def _swin_grid(tower: Any, height: int, width: int) -> Grid:
    patch_height, patch_width = pair(tower.patch_embed.patch_size)
    return height // patch_height, width // patch_width


def _swin(name: str, module: str, prefix: str, path: str, takes_z: str, **differs: Any) -> Family:
    """A family of maps (B, H, W, D) whose stages merge patches before their blocks."""

    def merged(tower: Any, stage: int, x: Tensor, args: Any) -> Tensor:
        return tower.get_submodule(path)[stage + 1].downsample(x)

    return _timm(
        name,
        module,
        prefix,
        f"{prefix}Block",
        post_norm=takes_z == "norm1",
        width=lambda tower: tower.feature_info[0]["num_chs"],
        num_prefix_tokens=lambda tower: 0,
        image_to_grid=_swin_grid,
        refuse=lambda tower: None,
        maps=True,
        stages=Stages(
            path=path,
            takes_z=takes_z,
            first=FirstMapBlock,
            attended=TappedWindows,
            skipped=NoWindows,
            windows=windows_of,
            between=merged,
        ),
        **differs,
    )


_CARRIERS = {
    "vision_transformer": ("patch_drop", "norm_pre"),
    "deit": ("patch_drop", "norm_pre"),
    "eva": ("norm_pre",),
}


def _timm(name: str, module: str, tower: str, block: str, *, post_norm: bool = False, **differs: Any) -> Family:
    shape: dict[str, Any] = {
        "blocks": "blocks",
        "norm": None if post_norm else "norm1",
        "attention": "attn",
        "returns_tuple": False,
        "embeddings": None,
        "final_norm": "norm",
        "width": lambda tower: tower.embed_dim,
        "num_prefix_tokens": lambda tower: tower.num_prefix_tokens,
        "image_to_grid": _grid,
        "image_size": _image_size,
        "projections": timm_projections,
        "attends": timm_attends,
        "carriers": _CARRIERS.get(module, ()),
        "checkpoints_calls": True,
        "refuse": _refuse,
    }
    return Family(
        name=f"{name} (timm)",
        towers=(f"timm.models.{module}.{tower}",),
        block=block if "." in block else f"timm.models.{module}.{block}",
        **{**shape, **differs},
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
    _timm("VisionTransformer", "vision_transformer", "VisionTransformer", _BLOCK),
    _timm(
        "VisionTransformer with res-post",
        "vision_transformer",
        "VisionTransformer",
        "ResPostBlock",
        post_norm=True,
    ),
    _timm("VisionTransformerDistilled", "deit", "VisionTransformerDistilled", _BLOCK),
    _timm("BEiT", "beit", "Beit", "Block"),
    _timm("EVA/EVA02/DINOv3/rope", "eva", "Eva", "EvaBlock"),
    _timm("EVA with post-norm", "eva", "Eva", "EvaBlockPostNorm", post_norm=True),
    _timm("relative position", "vision_transformer_relpos", "VisionTransformerRelPos", "RelPosBlock"),
    _timm(
        "relative position with res-post",
        "vision_transformer_relpos",
        "VisionTransformerRelPos",
        "ResPostRelPosBlock",
        post_norm=True,
    ),
    # Its class token meets the patches in blocks of their own, after these, and so does the last norm.
    _timm("CaiT", "cait", "Cait", "LayerScaleBlock", num_prefix_tokens=lambda tower: 0, final_norm=None),
    _timm("NaFlexViT", "naflexvit", "NaFlexVit", _BLOCK, **_NAFLEX),
    _timm("NaFlexViT with rope", "naflexvit", "NaFlexVit", _EVA_BLOCK, **_NAFLEX),
    _timm("Qwen3 ViT", "qwen3_vit", "Qwen3VitEncoder", _EVA_BLOCK, final_norm=None),
    _timm("DeepSeek ViT", "deepseek_vit", "DeepseekVitEncoder", "DeepseekVitBlock"),
    _timm(
        "SAM ViT",
        "vision_transformer_sam",
        "VisionTransformerSAM",
        "Block",
        final_norm=None,
        num_prefix_tokens=lambda tower: 0,
        projections=timm_sam_projections,
        maps=True,
    ),
    _timm("Hiera", "hiera", "Hiera", "HieraBlock", **_HIERA, image_size=fixed_size, refuse=refuse_units),
    _timm(
        "HieraDet",
        "hieradet_sam2",
        "HieraDet",
        "MultiScaleBlock",
        **_HIERA,
        image_size=pretrained_size,
        refuse=lambda tower: None,
        maps=True,
    ),
    _swin("Swin", "swin_transformer", "SwinTransformer", "layers", "drop_path1"),
    _swin("Swin v2", "swin_transformer_v2", "SwinTransformerV2", "layers", "norm1"),
    # Its last block norms X itself.
    _swin("Swin v2 CR", "swin_transformer_v2_cr", "SwinTransformerV2Cr", "stages", "norm1", final_norm=None),
    _timm(
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
)
_PLAIN = "use a plain VisionTransformer, such as vit_small_patch16_224"
_OR_SWIN = f"{_PLAIN}, or a Swin, whose stages are cut each for itself"
# Modules whose models look close enough to be tried, each with the reason and what to use instead.
REFUSED: dict[str, str] = {
    f"timm.models.{module}.": f"{reason}; {_OR_SWIN}"
    for module, reason in {
        "xcit": "it attends over channels, not over tokens, so there is no MSA to skip",
        "davit": "every second of its attentions is over channels, so that no two blocks in a row have a Z of tokens",
        "gcvit": "every second of its blocks asks with queries from outside the block, one window's for all windows",
        "mvitv2": "its MSA pools queries, keys and values by convolutions and adds the queries to its output",
        "nest": "its tokens lie in blocks of the image, within which they attend, not on a grid",
        "pvt_v2": "in all stages but the last its keys are of fewer tokens, so that little is left to save",
        "twins": "its attentions are over fewer keys, and in the SVT kind by turns within windows",
        "volo": "its first stage has no keys (outlook attention), and its plain blocks lie behind it in other lists",
    }.items()
} | {
    f"timm.models._features.{name}": "it holds the layers of a convolutional network, or of a Swin, one by one; "
    'a Swin can be cut where timm.create_model(…, features_only=True) is given feature_cls="getter" as well'
    for name in ("FeatureListNet", "FeatureDictNet")
}
