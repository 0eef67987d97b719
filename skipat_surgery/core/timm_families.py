"""The families of timm that can be cut, and why others cannot."""

from __future__ import annotations

from typing import Any

from torch import nn

from .family import Family, Grid, pair
from .timm_projections import timm_attends, timm_projections


def _grid(tower: Any, height: int, width: int) -> Grid:
    return tuple(tower.patch_embed.dynamic_feat_size((height, width)))


def _image_size(tower: Any) -> tuple[int, int, int]:
    size = tower.patch_embed.img_size or tower.pretrained_cfg["input_size"][1:]
    first = next(module for module in tower.patch_embed.modules() if isinstance(module, nn.Conv2d))
    return (first.in_channels, *pair(size))


def _refuse(tower: Any) -> str | None:
    if getattr(getattr(tower, "patch_drop", None), "prob", 0.0):
        return "its patch dropout removes tokens in training, so there is no grid; create it with patch_drop_rate=0"
    if tower.patch_embed.flatten and not tower.patch_embed.strict_img_size:
        return "it flattens patches of any size, so the grid is lost; create it with dynamic_img_size=True"
    return None


def _timm(name: str, module: str, tower: str, block: str, *, post_norm: bool = False) -> Family:
    return Family(
        name=f"{name} (timm)",
        towers=(f"timm.models.{module}.{tower}",),
        block=block if "." in block else f"timm.models.{module}.{block}",
        blocks="blocks",
        norm=None if post_norm else "norm1",
        attention="attn",
        returns_tuple=False,
        embeddings=None,
        final_norm="norm",
        width=lambda tower: tower.embed_dim,
        num_prefix_tokens=lambda tower: tower.num_prefix_tokens,
        image_to_grid=_grid,
        image_size=_image_size,
        projections=timm_projections,
        attends=timm_attends,
        carriers=("norm_pre",) if module in ("vision_transformer", "deit", "eva") else (),
        refuse=_refuse,
    )


_BLOCK = "timm.models.vision_transformer.Block"
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
)
_PLAIN = "use a plain VisionTransformer, such as vit_small_patch16_224"
_STAGES = f"its stages change the token grid, so Z of one block does not fit the next; {_PLAIN}"
# Modules whose models look close enough to be tried, each with the reason and what to use instead.
REFUSED: dict[str, str] = {
    "timm.models.cait.": f"its attention mixes heads, and its class token meets the patches only at the end; {_PLAIN}",
    "timm.models.xcit.": f"it attends over channels, not over tokens, so there is no MSA to skip; {_PLAIN}",
    "timm.models.naflexvit.": "it pads each image to a common number of patches, so a batch has no one grid; " + _PLAIN,
    "timm.models.vision_transformer_sam.": "its blocks attend within windows of a 2-D map, not over tokens; " + _PLAIN,
    "timm.models.swin_transformer.": _STAGES,
    "timm.models.swin_transformer_v2.": _STAGES,
    "timm.models.hiera.": _STAGES,
}
