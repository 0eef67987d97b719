"""The shape in which timm builds its ViTs, of which the families are made."""

from __future__ import annotations

from typing import Any

from torch import nn

from .family import Family, Grid, pair
from .timm_projections import timm_attends, timm_projections

DROPS = "its patch dropout removes tokens in training, so there is no grid; create it with patch_drop_rate=0"


def _grid(tower: Any, height: int, width: int) -> Grid:
    return tuple(tower.patch_embed.dynamic_feat_size((height, width)))


def _image_size(tower: Any) -> tuple[int, int, int]:
    size = tower.patch_embed.img_size or tower.pretrained_cfg["input_size"][1:]
    first = next(module for module in tower.patch_embed.modules() if isinstance(module, nn.Conv2d))
    return (first.in_channels, *pair(size))


def _refuse(tower: Any) -> str | None:
    if getattr(getattr(tower, "patch_drop", None), "prob", 0.0):
        return DROPS
    if tower.patch_embed.flatten and not tower.patch_embed.strict_img_size:
        return "it flattens patches of any size, so the grid is lost; create it with dynamic_img_size=True"
    return None


_CARRIERS = {
    "vision_transformer": ("patch_drop", "norm_pre"),
    "deit": ("patch_drop", "norm_pre"),
    "eva": ("norm_pre",),
}


def timm_family(name: str, module: str, tower: str, block: str, *, post_norm: bool = False, **differs: Any) -> Family:
    """A family of timm.

    Args:
        name: What users call it.
        module: Of ``timm.models``.
        tower: Name of the class that owns the blocks.
        block: Name of the class of every block, or where that is in another module, its dotted path.
        post_norm: Whether the MSA reads what the block is given, and no norm comes before it.
        differs: Fields of `Family` that differ from that shape.
    """
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
