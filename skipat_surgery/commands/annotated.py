"""A picture with the boxes and the mask of its objects, whatever they were read from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..analysis.discovery import BACKGROUND, VOID, Truth, ndimage
from .decoding import numbers_in

PNG_VOID = 255


@dataclass(frozen=True)
class Annotated:
    """A picture, read when it is asked for, with its objects.

    Args:
        picture: From Pillow's mode, the picture; None where it is corrupt.
        boxes: (n, 4) of (x1, y1, x2, y2) in pixels; None where they are to be taken from the mask.
        mask: Gives the class of each pixel (height, width), as `Truth` holds it, or None.
        size: (width, height) that the boxes are in; None for the picture's own.
    """

    picture: Callable[[str], PIL.Image.Image | None]
    boxes: Tensor | None
    mask: Callable[[], Tensor | None]
    size: tuple[float, float] | None = None

    def truth(self, picture_size: tuple[int, int]) -> Truth:
        """The objects, for a picture of this (width, height)."""
        mask = self.mask()
        if self.boxes is None:
            return Truth(torch.empty(0, 4) if mask is None else boxes_of(mask), mask)
        return Truth(self.boxes / torch.tensor((self.size or picture_size) * 2), mask)


def boxes_of(mask: Tensor) -> Tensor:
    """A box (n, 4), in fractions, around each connected part of one class of a mask (height, width)."""
    values, found = mask.numpy(), []
    for value in np.unique(values[(values != BACKGROUND) & (values != VOID)]):
        parts, _ = ndimage().label(values == value)
        found += [(x.start, y.start, x.stop, y.stop) for y, x in ndimage().find_objects(parts)]
    height, width = mask.shape
    return torch.tensor(found, dtype=torch.float32).view(-1, 4) / torch.tensor([width, height, width, height])


def png_mask(record: Any) -> Tensor | None:
    """The classes of a picture of them (height, width), where 255 is void; None where there is none."""
    values = numbers_in(record)
    return None if values is None else torch.from_numpy(np.where(values == PNG_VOID, VOID, values.astype(np.int32)))


def as_boxes(boxes: Sequence[Sequence[float]]) -> Tensor:
    """Boxes (n, 4), also where there are none."""
    return torch.tensor(boxes, dtype=torch.float32).view(-1, 4)


def corners_of(boxes: Tensor) -> Tensor:
    """Boxes (n, 4) of a corner and the size as those of two corners."""
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
