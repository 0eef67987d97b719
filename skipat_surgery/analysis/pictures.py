"""Pictures of what was measured. matplotlib is loaded only here, and only when a picture is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from torch import Tensor


def pyplot() -> Any:
    """matplotlib's pyplot, drawing to files.

    Raises:
        ImportError: matplotlib is not installed; with what to install.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'skipat-surgery[recipes]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def heatmaps(panels: Mapping[str, Tensor], title: str, path: Path, marked: Set[int] = frozenset()) -> None:
    """Draw matrices (L, L) side by side, with the numbers in their cells.

    Args:
        panels: The matrices, by title. NaN is left blank.
        title: Of the whole.
        path: Where to.
        marked: Rows and columns whose labels are set in bold and red.
    """
    plt = pyplot()
    depth = max(len(matrix) for matrix in panels.values())
    side = max(4.0, 0.42 * depth)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(side * len(panels) + 1, side + 0.6), squeeze=False, layout="constrained"
    )
    for axis, (name, matrix) in zip(axes[0], panels.items(), strict=True):
        image = axis.imshow(matrix.numpy(), vmin=0, vmax=1, cmap="viridis", origin="lower")
        for row, values in enumerate(matrix.tolist()):
            for column, value in enumerate(values):
                if value == value:
                    color = "white" if value < 0.6 else "black"
                    axis.text(
                        column, row, f"{value:.2f}".removeprefix("0"), ha="center", va="center", color=color, size=7
                    )
        axis.set(title=name, xlabel="block", ylabel="block", xticks=range(len(matrix)), yticks=range(len(matrix)))
        for label in [*axis.get_xticklabels(), *axis.get_yticklabels()]:
            if label.get_text().isdigit() and int(label.get_text()) in marked:
                label.set(color="C3", weight="bold")
    figure.colorbar(image, ax=axes[0], shrink=0.8)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def frontier(points: Mapping[str, tuple[list[float], list[float]]], y_label: str, title: str, path: Path) -> None:
    """Draw speed against closeness to the untouched model.

    Args:
        points: (speed-ups, values) by legend. The first is drawn as a line, the others as single marks.
        y_label: What the values are.
        title: Of the picture.
        path: Where to.
    """
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for index, (name, (x, y)) in enumerate(points.items()):
        axis.plot(
            x,
            y,
            "o-" if index == 0 else "sD^"[index % 3],
            color=f"C{index}",
            markersize=5 if index == 0 else 10,
            label=name,
        )
    axis.set(xlabel="speed-up over the untouched model", ylabel=y_label, title=title)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
