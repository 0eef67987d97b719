"""Cut timm models: the entry point ``skipat_vit``, which rebuilds them from a checkpoint's ``model_args``."""

from __future__ import annotations

from typing import Any

import timm
from timm.models import build_model_with_cfg, register_model
from torch import nn

from .config import SkipatConfig
from .families import find_tower
from .operation import check_skip, cut

ARCHITECTURE = "skipat_vit"


def _build(base: str, skipat: dict[str, Any], **kwargs: Any) -> nn.Module:
    config = SkipatConfig.from_dict(skipat)
    model = timm.create_model(base, pretrained=False, **kwargs)
    _, tower, family = find_tower(model)
    check_skip(config, len(family.block_list(tower)), base)
    cut(tower, family, config, keep_removed=False)
    return model


@register_model
def skipat_vit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A timm vision transformer cut as `skipat` says.

    Args:
        pretrained: Load the weights of the checkpoint that the configuration came from.
        base: The architecture that was cut, such as ``vit_small_patch16_224``.
        skipat: What `SkipatConfig.to_dict` wrote.
    """
    missing = [name for name in ("base", "skipat") if name not in kwargs]
    if missing:
        raise ValueError(
            f"{ARCHITECTURE} needs {missing}: it rebuilds saved models. To cut a model, create it and call "
            "skipat_surgery.apply(model, skip=…)"
        )
    return build_model_with_cfg(
        _build, ARCHITECTURE, pretrained, feature_cfg={"out_indices": 3, "feature_cls": "getter"}, **kwargs
    )


def can_adopt(model: object) -> bool:
    """Whether a model was made by ``timm.create_model``, so that it can be rebuilt by name."""
    return bool(getattr(model, "pretrained_cfg", None)) and hasattr(model, "_model_args")


def is_adopted(model: object) -> bool:
    """Whether a model records that it is rebuilt through `skipat_vit`."""
    return can_adopt(model) and model.pretrained_cfg["architecture"] == ARCHITECTURE  # type: ignore[attr-defined]


def adopt(model: Any, skipat: SkipatConfig) -> None:
    """Record in a timm model that was cut in place how to rebuild it."""
    base = model.pretrained_cfg["architecture"]
    model._model_args = {**model._model_args, "base": base, "skipat": skipat.to_dict()}
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "architecture": ARCHITECTURE}


def release(model: Any) -> None:
    """Undo `adopt`."""
    args = dict(model._model_args)
    args.pop("skipat")
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "architecture": args.pop("base")}
    model._model_args = args
