"""The families of transformers that can be cut, and why others cannot.

transformers builds its ViTs in four shapes of layer. They differ in the names of their slots and in whether the MSA
returns its weights as well; what differs within a shape is named in the entry.
"""

from __future__ import annotations

from typing import Any

from .family import Family, Grid, pair
from .transformers_projections import transformers_projections


def _image_size(tower: Any) -> tuple[int, int, int]:
    return (tower.config.num_channels, *pair(tower.config.image_size))


def _grid(embeddings: Any, height: int, width: int) -> Grid:
    """Of embeddings that know their patch size themselves, or leave it to their patch embeddings or their config."""
    for owner in (getattr(embeddings, "patch_embeddings", None), embeddings, getattr(embeddings, "config", None)):
        if hasattr(owner, "patch_size"):
            patch_height, patch_width = pair(owner.patch_size)  # type: ignore[union-attr]
            return height // patch_height, width // patch_width
    raise AttributeError(f"{type(embeddings).__name__} has no patch size")


def _transformers(name: str, module: str, towers: tuple[str, ...], block: str, prefix: Any, **shape: Any) -> Family:
    path = f"transformers.models.{module}.modeling_{module}."
    return Family(
        name=f"{name} (transformers)",
        towers=tuple(path + tower for tower in towers),
        block=path + block,
        embeddings="embeddings",
        width=lambda tower: tower.config.hidden_size,
        num_prefix_tokens=prefix if callable(prefix) else lambda tower: prefix,
        image_to_grid=_grid,
        image_size=_image_size,
        projections=transformers_projections,
        attends=lambda attention: True,
        **shape,
    )


def _registers(tower: Any) -> int:
    return 1 + tower.config.num_register_tokens


_SHAPE_V: dict[str, Any] = {
    "blocks": "layers",
    "norm": "layernorm_before",
    "attention": "attention",
    "returns_tuple": True,
    "final_norm": "layernorm",
}
_SHAPE_D: dict[str, Any] = {
    "blocks": "encoder.layer",
    "norm": "norm1",
    "attention": "attention",
    "returns_tuple": True,
    "final_norm": "layernorm",
}
_SHAPE_C: dict[str, Any] = {
    "blocks": "encoder.layers",
    "norm": "layer_norm1",
    "attention": "self_attn",
    "returns_tuple": True,
    "final_norm": "post_layernorm",
}
_SHAPE_O: dict[str, Any] = {**_SHAPE_V, "blocks": "encoder.layer", "returns_tuple": False}
# CLIP norms the class token alone after the last block, and all tokens before the first.
_CLIP: dict[str, Any] = {**_SHAPE_C, "final_norm": None, "carriers": ("pre_layrnorm",)}


def _refuse_dpt(tower: Any) -> str | None:
    if tower.config.is_hybrid:
        return "its tokens come from a convolutional backbone; use a DPT with is_hybrid=False"
    return None


FAMILIES: tuple[Family, ...] = (
    _transformers("ViT and DINO", "vit", ("ViTModel",), "ViTLayer", 1, **_SHAPE_V),
    _transformers("DeiT", "deit", ("DeiTModel",), "DeiTLayer", 2, **_SHAPE_V),
    _transformers("ViTMSN", "vit_msn", ("ViTMSNModel",), "ViTMSNLayer", 1, **_SHAPE_V),
    _transformers("I-JEPA", "ijepa", ("IJepaModel",), "IJepaLayer", 0, **_SHAPE_V),
    _transformers("BEiT", "beit", ("BeitModel",), "BeitLayer", 1, **_SHAPE_V, drop=("relative_position_bias",)),
    _transformers("DINOv2", "dinov2", ("Dinov2Model", "Dinov2Backbone"), "Dinov2Layer", 1, **_SHAPE_D),
    _transformers(
        "DINOv2 with registers",
        "dinov2_with_registers",
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"),
        "Dinov2WithRegistersLayer",
        _registers,
        **_SHAPE_D,
    ),
    _transformers(
        "DINOv3 ViT",
        "dinov3_vit",
        ("DINOv3ViTModel", "DINOv3ViTBackbone"),
        "DINOv3ViTLayer",
        _registers,
        **{**_SHAPE_D, "blocks": "model.layer", "final_norm": "norm"},
    ),
    _transformers("CLIP vision", "clip", ("CLIPVisionModel",), "CLIPEncoderLayer", 1, **_CLIP),
    _transformers("MetaCLIP 2 vision", "metaclip_2", ("MetaClip2VisionModel",), "MetaClip2EncoderLayer", 1, **_CLIP),
    _transformers("SigLIP vision", "siglip", ("SiglipVisionModel",), "SiglipEncoderLayer", 0, **_SHAPE_C),
    _transformers(
        "AIMv2 vision",
        "aimv2",
        ("Aimv2VisionModel",),
        "Aimv2EncoderLayer",
        0,
        blocks="encoder.layers",
        norm="rms_norm1",
        attention="attention",
        returns_tuple=True,
        final_norm="rms_norm",
    ),
    _transformers(
        "YOLOS",
        "yolos",
        ("YolosModel",),
        "YolosLayer",
        1,
        **_SHAPE_O,
        num_suffix_tokens=lambda tower: tower.config.num_detection_tokens,
        adds_between="encoder",
    ),
    _transformers("DPT", "dpt", ("DPTModel",), "DPTViTLayer", 1, **_SHAPE_O, refuse=_refuse_dpt),
    _transformers("Pixio", "pixio", ("PixioModel",), "PixioLayer", lambda tower: tower.config.n_cls_tokens, **_SHAPE_V),
    _transformers("ViTPose backbone", "vitpose_backbone", ("VitPoseBackbone",), "VitPoseBackboneLayer", 0, **_SHAPE_O),
)
# Model types that hold a tower of these families without being one; the Auto classes find their cut form on import.
# Others are found once a model of theirs has been cut in the process, and with trust_remote_code.
NESTING = (
    "depth_anything",
    "prompt_depth_anything",
    "upernet",
    "vitpose",
    "llava",
    "paligemma",
    "timm_wrapper",
)
_WINDOWS = (
    "its blocks attend within windows and change the token grid between stages, so Z of one does not fit the next"
)
_PLAIN = "use a plain ViT, such as DINOv2 or DINOv3"
# Packages whose models look close enough to be tried, each with the reason and what to use instead.
REFUSED: dict[str, str] = {
    "transformers.models.vit_mae.": "it shuffles and drops patches, so Φ has no grid; load its encoder as a ViTModel",
    "transformers.models.pixtral.": f"it packs the patches of all images into one sequence, without a grid; {_PLAIN}",
    "transformers.models.siglip2.": "it pads each image to a common number of patches, so a batch has no one grid; "
    "use SigLIP",
    "transformers.models.eomt.": "its last blocks prepend queries, so their tokens differ from those before; cut the "
    "DINOv2 that it was made from",
    "transformers.models.videomae.": "its patches form a 3-D grid of time, height and width, and Φ convolves over two; "
    f"{_PLAIN} per frame",
    "transformers.models.vivit.": "its patches form a 3-D grid of time, height and width, and Φ convolves over two; "
    f"{_PLAIN} per frame",
    "transformers.models.swin.": f"{_WINDOWS}; {_PLAIN}",
    "transformers.models.swinv2.": f"{_WINDOWS}; {_PLAIN}",
    "transformers.models.hiera.": f"{_WINDOWS}; {_PLAIN}",
    "transformers.models.sam.": f"its blocks attend within windows of a padded 2-D map, not over tokens; {_PLAIN}",
    "transformers.models.sam2.": f"{_WINDOWS}; {_PLAIN}",
    "transformers.models.vitdet.": f"its blocks attend within windows of a padded 2-D map, not over tokens; {_PLAIN}",
}
