"""What the lists of cases are made of: a family's models and heads, and what they share."""

from __future__ import annotations

from typing import Any

import small_models as make

from .case import Case


def cases_of(family: str, msa: str, prefix: int, *variants: tuple[Any, ...], **common: Any) -> list[Case]:
    """Cases of one family: (name, build, path of the tower, anything that differs)."""
    cases = []
    for name, build, tower, *differs in variants:
        settings = {"msa": f"{tower}.{msa}" if tower else msa, "prefix": prefix, **common, **(differs or [{}])[0]}
        cases.append(Case(name, family, build, **settings))
    return cases


SHAPE_V, SHAPE_D, SHAPE_C, SHAPE_O = (
    "layers.{}.attention",
    "encoder.layer.{}.attention",
    "encoder.layers.{}.self_attn",
    "encoder.layer.{}.attention",
)
SIZES: dict[str, Any] = {"others": ((16, 64), (64, 16), (48, 40))}
FLAG: dict[str, Any] = {**SIZES, "flags": {"interpolate_pos_encoding": True}}
WIDE: dict[str, Any] = {"size": (16, 32)}
VIDEO: dict[str, Any] = {"size": (4, 32, 32), "patch": (2, 8, 8)}
FIXED: dict[str, Any] = {"others": (), "flags": {}}


def heads(prefix: str, tower: str, *heads: str, **kwargs: Any) -> list[tuple[Any, ...]]:
    """The bare model of a transformers family and its heads."""
    config = f"{prefix}Config"
    bare = (f"{prefix}Model", make.hf(f"{prefix}Model", config, **kwargs), "")
    return [bare, *((f"{prefix}{head}", make.hf(f"{prefix}{head}", config, **kwargs), tower) for head in heads)]


def with_text(prefix: str, tower: str, **kwargs: Any) -> list[tuple[Any, ...]]:
    """A model of images and text, without and with its head."""
    models = ((f"{prefix}Model", tower), (f"{prefix}ForConditionalGeneration", f"model.{tower}"))
    differs = {"inputs": kwargs.pop("inputs"), "given": kwargs.pop("given", make.pixels), **FIXED}
    return [(name, make.vision_language(name, f"{prefix}Config", **kwargs), path, differs) for name, path in models]


def two_towers(prefix: str, towers: dict[str, str], **kwargs: Any) -> list[tuple[Any, ...]]:
    """The vision tower of a transformers family, and models of images and text: the path of the tower, by class."""
    kinds = [f"{prefix}{part}Config" for part in ("", "Vision", "Text")]
    found = []
    for name, path in towers.items():
        model, alone = f"{prefix}{name}", name == "VisionModel"
        build = make.hf(model, kinds[1]) if alone else make.two_towers(model, *kinds, **kwargs)
        found.append((model, build, path, {} if alone else {"inputs": make.text}))
    return found


ALONE: dict[str, Any] = {"inputs": make.nothing}
