"""A plan as a file: every figure of it, written whole or not at all, and read back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.config import PhiConfig
from .scoring import Point
from .search import Choice, Score

FORMAT_VERSION = 1


def write(figures: Mapping[str, Any], path: Path) -> None:
    """Write what `Plan.to_dict` gives, with the version of the format.

    Raises:
        OSError: The file cannot be written; one that was there is as it was.
    """
    text = json.dumps({"plan_version": FORMAT_VERSION, **figures}, indent=2, allow_nan=False)
    partial = path.with_name(f"{path.name}.unfinished")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def read(held: Any, name: str) -> dict[str, Any]:
    """The fields of a plan, of what `write` wrote.

    Args:
        held: What the file holds.
        name: Of the file, for errors.

    Raises:
        ValueError: It holds no plan, or one of a newer version.
    """
    version = held.get("plan_version") if isinstance(held, Mapping) else None
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"{name} holds no plan")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{name} is a plan of version {version}, this library reads up to {FORMAT_VERSION}: upgrade skipat-surgery"
        )
    try:
        fit, scored = map(int, held["images"])
        return {
            "chosen": _point(held["chosen"]),
            "speedup": float(held["speedup"]),
            "paper": _point(held["paper"]),
            "paper_speedup": float(held["paper_speedup"]),
            "frontier": tuple(map(_point, held["frontier"])),
            "scores": tuple(map(_score, held["scores"])),
            "images": (fit, scored),
        }
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} holds a damaged plan: {type(error).__name__}, {error}") from error


def _point(held: Mapping[str, Any]) -> Point:
    choice, agreement = held["choice"], held["agreement"]
    phi = {int(block): PhiConfig(**phi) for block, phi in choice["phi"].items()}
    divergence = None if choice["divergence"] is None else float(choice["divergence"])
    return Point(
        Choice(phi, float(choice["speedup"]), divergence),
        _figure(held["divergence"]),
        None if agreement is None else float(agreement),
    )


def _score(held: Mapping[str, Any]) -> Score:
    return Score(tuple(map(int, held["run"])), PhiConfig(**held["phi"]), _figure(held["divergence"]))


def _figure(value: float | None) -> float:
    """What was not finite was written as null."""
    return math.nan if value is None else float(value)
