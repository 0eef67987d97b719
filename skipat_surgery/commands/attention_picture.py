"""The attention of models side by side: a picture, then the map of each, with what was found in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
from torch import Tensor

from ..analysis.discovery import Truth
from ..analysis.discovery_figures import LOST, TOKENCUT, Found
from ..analysis.pictures import ACCENT, INK, PAGE, STYLE, pyplot

SIDE = 2.2  # inches


@dataclass(frozen=True)
class Example:
    """A picture to show.

    Args:
        picture: The picture.
        truth: Its objects.
        found: By model.
    """

    picture: PIL.Image.Image
    truth: Truth
    found: Mapping[str, Found]


def draw(examples: Sequence[Example], path: Path) -> None:
    """Draw a row for each picture: with the boxes of its objects, then each model's mean A^[CLS] with its own boxes."""
    plt = pyplot()
    columns = ["objects", *examples[0].found]
    with plt.rc_context(STYLE):
        size = (SIDE * len(columns), SIDE * len(examples) + 0.4)
        figure, axes = plt.subplots(len(examples), len(columns), figsize=size, squeeze=False, layout="constrained")
        for row, example in zip(axes, examples, strict=True):
            row[0].imshow(example.picture)
            for box in example.truth.boxes:
                outline(row[0], box, example.picture.size, ACCENT)
            for axis, found in zip(row[1:], example.found.values(), strict=True):
                draw_map(axis, example.picture, found)
            for axis in row:
                axis.set_axis_off()
        for axis, name in zip(axes[0], columns, strict=True):
            axis.set_title(name)
        figure.suptitle(f"Mean CLS attention of the last block; {LOST} solid, {TOKENCUT} dashed", x=0.01, ha="left")
        figure.savefig(path, dpi=120)
        plt.close(figure)


def draw_map(axis: Any, picture: PIL.Image.Image, found: Found) -> None:
    """Draw a map over the whole of a picture, or the picture where a model has none, with the boxes that were found."""
    width, height = picture.size
    if found.attention is None:
        axis.imshow(picture)
    else:
        axis.imshow(found.attention.numpy(), extent=(0, width, height, 0), interpolation="nearest")
    for name, line in ((LOST, "-"), (TOKENCUT, "--")):
        outline(axis, found.boxes[name], picture.size, PAGE if found.attention is not None else INK, line)


def outline(axis: Any, box: Tensor, size: tuple[int, int], colour: str, line: str = "-") -> None:
    """Draw a box (4,), in fractions, on a picture of a size."""
    left, top, right, bottom = (float(side) * size[index % 2] for index, side in enumerate(box))
    axis.plot([left, right, right, left, left], [top, top, bottom, bottom, top], line, color=colour, linewidth=1.2)
