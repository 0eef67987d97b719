"""Cut timm models: the entry point ``skipat_vit``, which rebuilds them from a checkpoint's ``model_args``.

They are saved and pushed like transformers models: ``save_pretrained``, ``push_to_hub``. What these write, timm's own
``save_for_hf`` writes too, but for the model card.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
from timm.models import build_model_with_cfg, register_model
from torch import nn

from .core.card import model_card, write_card
from .core.checking import check_cut
from .core.config import SkipatConfig
from .core.cutting import apply_to_tower, with_widths
from .core.finding import families_of, find_tower
from .core.grafting import Grafted, graft, ungraft
from .core.hub import push

ARCHITECTURE = "skipat_vit"


class HubModel(Grafted):
    """A cut timm model that saves and pushes itself as a transformers model does."""

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write weights, configuration and model card, for ``timm.create_model("local-dir:…", pretrained=True)``."""
        save(self, save_directory)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Push the checkpoint and its model card to the Hub: see `skipat_surgery.core.hub.push`."""
        return push(self.save_pretrained, repo_id, **kwargs)


def save(model: Any, folder: str | Path) -> None:
    """Save a timm model, cut or not, with timm's own writer."""
    if is_adopted(model):
        tell_config(model)  # a tower of it may have been narrowed alone
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    config_file = Path(folder) / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    # timm 1.0.31 writes num_classes twice, and transformers' TimmWrapper then passes it twice and fails.
    config.get("model_args", {}).pop("num_classes", None)
    config_file.write_text(json.dumps(config, indent=2, allow_nan=False), encoding="utf-8")
    if is_adopted(model):
        write_card(folder, model_card(model._model_args["skipat"], "timm", load_with=""))


def _build(base: str, skipat: dict[str, Any], **kwargs: Any) -> nn.Module:
    config = SkipatConfig.from_dict(skipat)
    model = timm.create_model(base, pretrained=False, **kwargs)
    _, tower, family = find_tower(model)
    check_cut(tower, family, config, base)
    apply_to_tower(tower, family, config, keep_removed=False)
    graft(model, HubModel)
    return model


def _filter_of(base: str) -> Callable[..., dict[str, Any]] | None:
    """What fits the weights of a timm model to one made for images of another size; None where timm has nothing.

    Source: timm, ``_create_vision_transformer``, for the two kinds that it resizes in another way.
    """
    module = importlib.import_module(timm.models.model_entrypoint(base).__module__)
    fit: Any = getattr(module, "checkpoint_filter_fn", None)
    if "flexi" not in base and "radio" not in base:
        return fit
    aligned = any(name in base for name in getattr(module, "_RADIO_ALIGN_CORNERS", ()))
    return partial(fit, interpolation="bilinear", antialias=False, **({"align_corners": True} if aligned else {}))


@register_model
def skipat_vit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A timm vision transformer cut as `skipat` says.

    Made with another ``img_size`` or ``in_chans`` than its checkpoint, it fits the weights as timm does for `base`.

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
        _build,
        ARCHITECTURE,
        pretrained,
        pretrained_filter_fn=_filter_of(kwargs["base"]),
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **kwargs,
    )


def can_adopt(model: Any) -> bool:
    """Whether a model was made by ``timm.create_model``, so that it can be rebuilt by name: a tower, or around one."""
    by_name = bool(getattr(model, "pretrained_cfg", None)) and hasattr(model, "_model_args")
    if not by_name or type(model).__module__ == "timm.models._features":  # features_only: see skipat_surgery.save
        return False
    return any(families_of(module) for module in model.modules())


def is_adopted(model: object) -> bool:
    """Whether a model records that it is rebuilt through `skipat_vit`."""
    return can_adopt(model) and model.pretrained_cfg["architecture"] == ARCHITECTURE  # type: ignore[attr-defined]


def adopt(model: Any, skipat: SkipatConfig) -> None:
    """Record in a timm model that was cut in place how to rebuild it."""
    base = model.pretrained_cfg["architecture"]
    model._model_args = {**model._model_args, "base": base, "skipat": skipat.to_dict()}
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "architecture": ARCHITECTURE}
    graft(model, HubModel)


def tell_config(model: Any) -> None:
    """Have the arguments that rebuild a cut model say how wide its MLPs are by now."""
    told = with_widths(SkipatConfig.from_dict(model._model_args["skipat"]), model)
    model._model_args = {**model._model_args, "skipat": told.to_dict()}


def release(model: Any) -> None:
    """Undo `adopt`."""
    args = dict(model._model_args)
    args.pop("skipat")
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "architecture": args.pop("base")}
    model._model_args = args
    ungraft(model)
