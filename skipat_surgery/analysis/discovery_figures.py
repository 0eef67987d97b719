"""What was found in images beside what is there: figures for each model, and for boxes that look at nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from rich.table import Table
from torch import Tensor

from ..result import Result, titled_table
from .discovery import (
    CENTRED_BOX,
    LOST_PATCHES,
    WHOLE_IMAGE,
    Truth,
    centred,
    jaccard,
    localised,
    lost,
    most_of,
    tokencut,
)
from .last_block import LastBlock

LOST, TOKENCUT = "LOST", "TokenCut"
TRIVIAL = {"whole image": WHOLE_IMAGE, "centred 70 %": CENTRED_BOX}


@dataclass(frozen=True)
class Found:
    """What was found in an image.

    Args:
        boxes: (4,), by the name of what found them.
        regions: (heads, H, W) of booleans, by the mass of attention that they hold; empty without attention.
        attention: The heads' mean A^[CLS], (H, W); None for a model without a prefix token.
    """

    boxes: Mapping[str, Tensor]
    regions: Mapping[float, Tensor]
    attention: Tensor | None = None


def found_by(
    block: LastBlock, index: int, masses: Sequence[float], lost_patches: int = LOST_PATCHES, centre: bool = False
) -> Found:
    """What the last block finds in one of its images, by its keys as they are or `centred`."""
    keys = block.keys[index].cpu()
    keys = centred(keys) if centre else keys
    boxes = {LOST: lost(keys, lost_patches), TOKENCUT: tokencut(keys)}
    if block.attention is None:
        return Found(boxes, {})
    attention = block.attention[index].cpu()
    return Found(boxes, {mass: most_of(attention, mass) for mass in masses}, attention.mean(dim=0))


def trivial(box: Tensor, truth: Truth, masses: Sequence[float]) -> Found:
    """A box that looks at nothing, as if it were found, and all that it holds as the region."""
    regions = {} if truth.mask is None else dict.fromkeys(masses, inside_box(box, truth.mask))
    return Found({LOST: box, TOKENCUT: box}, regions)


def inside_box(box: Tensor, mask: Tensor) -> Tensor:
    """The pixels of a mask (height, width) whose middle lies in a box, as a region (1, height, width)."""
    y, x = ((torch.arange(side) + 0.5) / side for side in mask.shape)
    rows, columns = (y >= box[1]) & (y < box[3]), (x >= box[0]) & (x < box[2])
    return (rows[:, None] & columns)[None]


def figures_of(found: Found, truth: Truth) -> dict[str, float]:
    """What was found in an image, beside what is there; what is not known of that is not measured.

    Returns:
        ``CorLoc NAME``, 0 or 1, of each box; ``Jaccard MASS, best head`` and ``Jaccard MASS, mean`` of each mass: the
        mean over the classes in the image of the best head's IoU, which may be another for each, and of all heads'.
    """
    figures: dict[str, float] = {}
    if len(truth.boxes):
        figures |= {f"CorLoc {name}": float(localised(box, truth)) for name, box in found.boxes.items()}
    if truth.mask is not None:
        for mass, regions in found.regions.items():
            iou = jaccard(regions, truth.mask)
            if len(iou):
                figures[f"Jaccard {mass:g}, best head"] = float(iou.amax(dim=1).mean())
                figures[f"Jaccard {mass:g}, mean"] = float(iou.mean())
    return figures


@dataclass(frozen=True)
class Discovery(Result):
    """Figures of object discovery, from 0 to 1.

    Args:
        rows: By row, the mean over images of each figure of `figures_of`.
        with_boxes: How many images CorLoc was counted on.
        with_masks: How many images Jaccard was measured on.
    """

    rows: Mapping[str, Mapping[str, float]]
    with_boxes: int
    with_masks: int

    @classmethod
    def of(cls, images: Mapping[str, Sequence[Mapping[str, float]]]) -> Discovery:
        """From the figures of each image, by row; an image that lacks one does not count there."""
        rows = {}
        for row, figures in images.items():
            names = dict.fromkeys(name for each in figures for name in each)
            rows[row] = {name: mean(each[name] for each in figures if name in each) for name in names}
        last = list(images.values())[-1]
        counts = [sum(any(name.startswith(kind) for name in each) for each in last) for kind in ("CorLoc", "Jaccard")]
        return cls(rows, *counts)

    def table(self) -> Table:
        """A row for each model and for each trivial box, in percent."""
        names = list(dict.fromkeys(name for row in self.rows.values() for name in row))
        title = f"Object discovery, %: CorLoc on {self.with_boxes:,} images, Jaccard on {self.with_masks:,}"
        shown = titled_table(title, "", *names)
        for row, figures in self.rows.items():
            shown.add_row(row, *(f"{100 * figures[name]:.1f}" if name in figures else "–" for name in names))
        return shown
