"""Labels of images: a class for each, or a map of classes or numbers, and what stands where there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NO_LABEL = -1


def class_ids(labels: Any, logits: Tensor) -> Tensor:
    """Labels as classes (B,) of the logits (B, classes), on their device, with NO_LABEL where an image has none.

    Args:
        labels: Integers (B,) of any dtype, or a list of these; NO_LABEL or None for none.
        logits: What they are compared with.

    Raises:
        ValueError: They are others, or not one for each image.
    """
    if not isinstance(labels, Tensor):
        labels = torch.tensor([NO_LABEL if label is None else label for label in labels])
    count = logits.shape[-1]
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels must be one integer for each of {len(logits)} images, got {labels.dtype} {tuple(labels.shape)}"
        )
    labels = labels.to(logits.device, torch.long)
    if bool(((labels < NO_LABEL) | (labels >= count)).any()):
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, and the model's classes from 0 to "
            f"{count - 1}, with {NO_LABEL} where there is no label"
        )
    return labels


def map_by_map(
    measure: Callable[[Tensor, Tensor], Tensor | None], given: Tensor, labels: Sequence[Tensor | None], figures: int
) -> tuple[Tensor, Tensor]:
    """What is measured of each image against its map of labels, whatever the size of that.

    Args:
        measure: From what a model gives for an image and the labels (height, width), the figures (figures,); None where
            no pixel has a label.
        given: What the model gives (B, …).
        labels: The map of each image, (height, width); None where it has none.
        figures: How many figures there are.

    Returns:
        The figures (B, figures), 0 where there is no label, and whether there is one (B,).

    Raises:
        ValueError: The labels are no maps, or not one for each image.
    """
    shapes = [None if each is None else tuple(getattr(each, "shape", ())) for each in labels]
    if len(shapes) != len(given) or any(shape is not None and len(shape) != 2 for shape in shapes):
        raise ValueError(
            f"labels must be a map (height, width), or None, for each of {len(given)} images, got the shapes {shapes}"
        )
    pairs = zip(given, labels, strict=True)
    found = [None if each is None else measure(part, each.to(part.device)) for part, each in pairs]
    nothing = torch.zeros(figures, dtype=torch.float64, device=given.device)
    rows = torch.stack([nothing if row is None else row.to(nothing) for row in found])
    return rows, torch.tensor([row is not None for row in found], device=given.device)
