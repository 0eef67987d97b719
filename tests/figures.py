"""What a matplotlib picture shows, read back from the figure that is saved; and pictures to try things with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
from matplotlib.figure import Figure
from PIL import Image


@contextlib.contextmanager
def saved_figures() -> Iterator[list[Figure]]:
    """The figures that are saved inside the context, in order."""
    found: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: object, **kwargs: object) -> None:
        found.append(figure)
        save(figure, *args, **kwargs)

    with mock.patch.object(Figure, "savefig", keep):
        yield found


def lines_of(figure: Figure, axis: int = 0) -> dict[str, tuple[list[float], list[float]]]:
    """The lines of a picture by their legend: (x, y)."""
    lines = figure.axes[axis].get_lines()
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}


def colours(path: Path) -> int:
    """How many colours a picture on disk has: a blank one has one, a drawn one dozens."""
    with Image.open(path) as image:
        return len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0))


def picture(side: int = 16) -> Image.Image:
    """A square of noise, another for each side."""
    return Image.fromarray(np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8))
