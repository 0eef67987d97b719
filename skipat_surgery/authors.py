"""Reading the checkpoints that the paper's authors released, into a timm or transformers model.

They are the weights of a timm 0.5.4 VisionTransformer with six Φ beside it, ``param_1`` to ``param_6``, for blocks 3 to
8. The attention of the skipped blocks is still in them, unused; it is left out here. Source:
github.com/Qualcomm-AI-research/skip-attention, ``model/vit_skipat.py``.
"""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from .core.config import PhiConfig
from .surgery import apply

SKIP = range(3, 9)
HEAD_WIDTH = 64  # of every model that the authors released
NEEDED = ("patch_embed.proj.weight", "pos_embed", "head.weight", "blocks.0.mlp.fc1.weight", "param_6.eca.conv.weight")
PHI = {"linear1.0": "expand", "dwconv.0": "depthwise", "linear2.0": "reduce", "eca.conv": "eca"}
TRANSFORMERS = {
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "blocks.": "vit.layers.",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "norm.": "vit.layernorm.",
    "head.": "classifier.",
}


def load_authors(path: str | Path, host: str = "timm") -> nn.Module:
    """Load a checkpoint of the paper's release, such as ``skipat_tiny_patch16_224.t7``.

    Args:
        path: The file.
        host: ``"timm"`` for a VisionTransformer, ``"transformers"`` for a ViTForImageClassification.

    Returns:
        The cut model, in evaluation mode; `save_pretrained` makes a standard checkpoint of it.

    Raises:
        ValueError: The file runs code when it is read, or does not hold such a model.

    Examples:
        >>> import skipat_surgery
        >>> skipat_surgery.load_authors("skipat_tiny_patch16_224.t7").save_pretrained("skipat-tiny")
    """
    if host not in ("timm", "transformers"):
        raise ValueError(f"host must be 'timm' or 'transformers', got {host!r}")
    weights = _read(path)
    missing = [
        name for name in ("patch_embed.proj.weight", "pos_embed", "param_6.eca.conv.weight") if name not in weights
    ]
    if missing:
        raise ValueError(
            f"{path} is no checkpoint of the SkipAT release: it lacks {missing}. Expected are the keys of timm's "
            "VisionTransformer and param_1 to param_6"
        )
    model = _timm_model(weights) if host == "timm" else _transformers_model(weights)
    apply(model, SKIP, PhiConfig.paper())
    renamed = _rename(weights)
    model.load_state_dict(renamed if host == "timm" else _to_transformers(renamed))
    return model.eval()


def _read(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file, which may lie under a name and carry DataParallel's prefix."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # training scripts store their arguments as one
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than weights and is refused, as reading it could run code: {error}"
        ) from error
    for name in ("model", "state_dict_ema", "state_dict"):
        if isinstance(content, dict) and name in content:
            content = content[name]
            break
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no weights by name")
    return {name.removeprefix("module."): value for name, value in content.items()}


def _shape(weights: dict[str, Tensor]) -> dict[str, int]:
    width, channels, patch, _ = weights["patch_embed.proj.weight"].shape
    return {
        "width": width,
        "channels": channels,
        "patch": patch,
        "size": round((weights["pos_embed"].shape[1] - 1) ** 0.5) * patch,
        "depth": 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
        "heads": max(1, width // HEAD_WIDTH),
        "hidden": weights["blocks.0.mlp.fc1.weight"].shape[0],
        "classes": weights["head.weight"].shape[0],
    }


def _timm_model(weights: dict[str, Tensor]) -> nn.Module:
    shape = _shape(weights)
    names = {192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224", 768: "vit_base_patch16_224"}
    return timm.create_model(
        names.get(shape["width"], "vit_tiny_patch16_224"),
        img_size=shape["size"],
        patch_size=shape["patch"],
        in_chans=shape["channels"],
        embed_dim=shape["width"],
        depth=shape["depth"],
        num_heads=shape["heads"],
        mlp_ratio=shape["hidden"] / shape["width"],
        num_classes=shape["classes"],
    )


def _transformers_model(weights: dict[str, Tensor]) -> nn.Module:
    shape = _shape(weights)
    settings: dict[str, Any] = {
        "image_size": shape["size"],
        "patch_size": shape["patch"],
        "num_channels": shape["channels"],
        "hidden_size": shape["width"],
        "num_hidden_layers": shape["depth"],
        "num_attention_heads": shape["heads"],
        "intermediate_size": shape["hidden"],
        "num_labels": shape["classes"],
        "layer_norm_eps": 1e-6,  # as in timm
    }
    return ViTForImageClassification(ViTConfig(**settings))


def _rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of a timm model that was cut here."""
    dead = tuple(f"blocks.{index}.{part}." for index in SKIP for part in ("attn", "norm1"))
    renamed = {}
    for name, value in weights.items():
        if name.startswith("param_"):
            owner, _, rest = name.partition(".")
            part, _, kind = rest.rpartition(".")
            name = f"blocks.{SKIP[int(owner.removeprefix('param_')) - 1]}.phi.{PHI[part]}.{kind}"
        if not name.startswith(dead):
            renamed[name] = value
    return renamed


def _to_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of transformers' ViT, which keeps query, key and value apart."""
    renamed = {}
    for name, value in weights.items():
        for theirs, ours in TRANSFORMERS.items():
            if name.startswith(theirs) or (theirs in name and theirs in ("norm1", "norm2", "attn.proj")):
                name = name.replace(theirs, ours, 1)
        if ".attn.qkv." in name:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                renamed[name.replace("attn.qkv", f"attention.{part}_proj")] = rows
        else:
            renamed[name] = value
    return renamed
