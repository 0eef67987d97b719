"""The shapes of layer in which transformers builds its ViTs, of which the families are made.

There are four. They differ in the names of their slots and in whether the MSA returns its weights as well; what differs
within a shape is named in the entry.
"""

from __future__ import annotations

from typing import Any

from .family import Family, Grid, pair
from .transformers_projections import transformers_projections


def image_size_of(tower: Any) -> tuple[int, int, int]:
    """The configured (channels, height, width)."""
    return (getattr(tower.config, "num_channels", 3), *pair(tower.config.image_size))  # BLIP's always take three


def _grid(embeddings: Any, height: int, width: int) -> Grid:
    """Of embeddings that know their patch size themselves, or leave it to their patch embeddings or their config."""
    for owner in (getattr(embeddings, "patch_embeddings", None), embeddings, getattr(embeddings, "config", None)):
        if hasattr(owner, "patch_size"):
            patch_height, patch_width = pair(owner.patch_size)  # type: ignore[union-attr]
            return height // patch_height, width // patch_width
    raise AttributeError(f"{type(embeddings).__name__} has no patch size")


def transformers_family(
    name: str, module: str, towers: tuple[str, ...], block: str, prefix: Any, **shape: Any
) -> Family:
    """A family of transformers.

    Args:
        name: What users call it.
        module: The package of its model type, of ``transformers.models``.
        towers: Names of the classes that own the blocks.
        block: Name of the class of every block.
        prefix: The number of tokens before the patches, or from the tower that number.
        shape: Of the layers, and what differs from it: fields of `Family`. ``file`` is the module's, where it is not
            ``modeling_`` and the package.
    """
    path = f"transformers.models.{module}.{shape.pop('file', f'modeling_{module}')}."
    defaults: dict[str, Any] = {
        "embeddings": "embeddings",
        "image_to_grid": _grid,
        "image_size": image_size_of,
        "projections": transformers_projections,
        "width": lambda tower: tower.config.hidden_size,
    }
    return Family(
        name=f"{name} (transformers)",
        towers=tuple(path + tower for tower in towers),
        block=path + block,
        num_prefix_tokens=prefix if callable(prefix) else lambda tower: prefix,
        attends=lambda attention: True,
        **{**defaults, **shape},
    )


SHAPE_V: dict[str, Any] = {
    "blocks": "layers",
    "norm": "layernorm_before",
    "attention": "attention",
    "returns_tuple": True,
    "final_norm": "layernorm",
}
SHAPE_D: dict[str, Any] = {
    "blocks": "encoder.layer",
    "norm": "norm1",
    "attention": "attention",
    "returns_tuple": True,
    "final_norm": "layernorm",
}
SHAPE_C: dict[str, Any] = {
    "blocks": "encoder.layers",
    "norm": "layer_norm1",
    "attention": "self_attn",
    "returns_tuple": True,
    "final_norm": "post_layernorm",
}
SHAPE_O: dict[str, Any] = {**SHAPE_V, "blocks": "encoder.layer", "returns_tuple": False}
# CLIP norms the class token alone after the last block, and all tokens before the first.
CLIP: dict[str, Any] = {**SHAPE_C, "final_norm": None, "carriers": ("pre_layrnorm",)}
OWL: dict[str, Any] = {**CLIP, "carriers": ("pre_layernorm",)}
# BLIP norms the class token once more.
BLIP: dict[str, Any] = {**SHAPE_C, "final_norm": None}


def registers_of(tower: Any) -> int:
    """The number of prefix tokens of a tower with a class token and registers."""
    return 1 + tower.config.num_register_tokens
