"""Colours of classes and of numbers, the same in every picture."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 8


def class_colours(classes: Tensor) -> Tensor:
    """The colours (…, 3), from 0 to 1, of classes (…) by the colour map of Pascal VOC, where class 0 is black.

    Bit 3k of a class is one of red, bit 3k + 1 of green and bit 3k + 2 of blue, the lowest bits counting most.
    """
    bits = torch.arange(BITS, device=classes.device)
    channels = [((classes.unsqueeze(-1) >> (3 * bits + channel)) & 1) << (BITS - 1 - bits) for channel in range(3)]
    return torch.stack([channel.sum(dim=-1) for channel in channels], dim=-1) / (2**BITS - 1)


def greys(values: Tensor, darkest: float, brightest: float) -> Tensor:
    """Greys (…, 3), from 0 to 1, of numbers (…) between two that are black and white."""
    span = max(brightest - darkest, torch.finfo(values.dtype).tiny)
    return ((values - darkest) / span).clamp(0, 1).unsqueeze(-1).expand(*values.shape, 3)
