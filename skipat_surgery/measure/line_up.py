"""The models of a benchmark: the untouched one, cut ones and the limit."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn

from ..core.config import PhiConfig
from ..observing import image_part
from ..surgery import apply
from .benchmark import LIMIT, UNTOUCHED, Rival
from .limit import limit


def line_up(model: nn.Module, skip: Iterable[int], phis: Mapping[str, PhiConfig]) -> list[Rival]:
    """The untouched model, a cut copy for every Φ, and the limit.

    Args:
        model: Untouched; it stays so.
        skip: The blocks to skip, counted from 0.
        phis: The Φ, by the name of their row.
    """
    skip = list(skip)
    cuts = [Rival(name, apply(copy.deepcopy(model), skip, phi, keep_removed=False)) for name, phi in phis.items()]
    return [Rival(UNTOUCHED, model), *cuts, Rival(LIMIT, limit(model, skip))]


def compiled(rivals: Iterable[Rival], name: str = "compiled", how: str = "default") -> list[Rival]:
    """The same models under ``torch.compile``.

    Args:
        rivals: The models.
        name: Of the mode in which they are compared.
        how: What ``torch.compile`` calls its mode.
    """
    return [
        replace(rival, call=torch.compile(image_part(rival.model), dynamic=False, mode=how), mode=name)
        for rival in rivals
    ]
