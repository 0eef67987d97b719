"""Pictures of what was measured, as files and for a page. matplotlib is loaded only when a picture is drawn.

A chart is a function that draws on an axis. Its colours are these five, which on a page are the page's own, light or
dark.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

INK, MUTED, LINE, PAGE, ACCENT = "#16181d", "#6a7180", "#e3e5ea", "#ffffff", "#2f4fd8"
ON_A_PAGE = {INK: "ink", MUTED: "muted", LINE: "line", PAGE: "page", ACCENT: "accent"}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "skipat",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.prop_cycle": f"cycler('color', ['{ACCENT}', '{MUTED}', '{INK}'])",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "figure.facecolor": PAGE,
    "grid.color": LINE,
    "legend.frameon": False,
    "lines.markersize": 4,
    "xtick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.color": LINE,
    "ytick.labelcolor": MUTED,
}
# The most blocks with a number in every cell.
NUMBERED = 16
Chart = Callable[[Any], object]
Points = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def pyplot() -> Any:
    """matplotlib's pyplot, drawing to files.

    Raises:
        ImportError: matplotlib is not installed; with what to install.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib, which skipat-surgery brings: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def write(charts: Mapping[str, Chart], size: tuple[float, float], path: str | Path, title: str = "") -> None:
    """Draw charts side by side into a file of any ending that matplotlib writes.

    Args:
        charts: By title.
        size: (width, height) of each, in inches.
        path: Where to.
        title: Of the whole.
    """
    plt = pyplot()
    with plt.rc_context(STYLE):
        whole = (size[0] * len(charts), size[1])
        figure, axes = plt.subplots(1, len(charts), figsize=whole, squeeze=False, layout="constrained")
        for axis, (name, chart) in zip(axes[0], charts.items(), strict=True):
            chart(axis)
            axis.set_title(name)
        figure.suptitle(title, x=0.01, ha="left")
        figure.savefig(path, dpi=120)
        plt.close(figure)


def as_svg(chart: Chart, size: tuple[float, float], description: str) -> str:
    """Draw a chart as an ``<svg>`` to stand in an HTML page, whose colours are CSS variables of that page.

    Args:
        chart: Draws on an axis.
        size: (width, height), in inches; it is scaled to the room there is.
        description: What those read who do not see it.
    """
    drawn = io.StringIO()
    plt = pyplot()
    with plt.rc_context({**STYLE, "figure.facecolor": "none"}):
        figure, axis = plt.subplots(figsize=size, layout="constrained")
        chart(axis)
        figure.savefig(drawn, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        plt.close(figure)
    svg = drawn.getvalue()
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])  # an id stands once on a page
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    label = html.escape(description)
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {view[0]} role="img" aria-label="{label}">'
    svg = re.sub(r"^<svg[^>]*>", lambda _: opening, svg).replace("xlink:href", "href")
    return re.sub("|".join(ON_A_PAGE), lambda found: f"var(--{ON_A_PAGE[found[0]]})", svg)


def heatmaps(panels: Mapping[str, Tensor], title: str, path: Path, marked: Set[int] = frozenset()) -> None:
    """Draw matrices (L, L) side by side, with the numbers in their cells.

    Args:
        panels: The matrices, by title. NaN is left blank.
        title: Of the whole.
        path: Where to.
        marked: Rows and columns whose labels are set in bold.
    """
    side = max(4.0, 0.42 * max(len(matrix) for matrix in panels.values()))
    charts = {name: partial(draw_heatmap, matrix=matrix, marked=marked) for name, matrix in panels.items()}
    write(charts, (side, side), path, title)


def draw_heatmap(axis: Any, matrix: Tensor, marked: Set[int] = frozenset()) -> None:
    """Draw a matrix (L, L) of values from 0, blank, to 1, the full colour; marked rows and columns stand out."""
    import matplotlib.colors

    depth, numbers = len(matrix), matrix.tolist()
    # A page gives the colour, and a cell only its share of it.
    shares = [matplotlib.colors.to_rgba(ACCENT, share) for share in (0, 1)]
    cmap = matplotlib.colors.LinearSegmentedColormap.from_list("shares", shares)
    axis.pcolormesh(matrix.numpy(), cmap=cmap, vmin=0, vmax=1)
    for row, values in enumerate(numbers):
        for column, value in enumerate(values):
            if value == value and depth <= NUMBERED:
                colour, text = (PAGE if value > 0.7 else INK), f"{value:.2f}".removeprefix("0")
                axis.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=colour, size=6)
    step = 1 if depth <= NUMBERED else 4
    ticks = [block + 0.5 for block in range(0, depth, step)]
    labels = [str(block) for block in range(0, depth, step)]
    axis.set(xlabel="block", ylabel="block", xticks=ticks, yticks=ticks, xticklabels=labels, yticklabels=labels)
    axis.set_aspect("equal")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    for label in [*axis.get_xticklabels(), *axis.get_yticklabels()]:
        if int(label.get_text()) in marked:
            label.set(color=ACCENT, weight="bold")


def frontier(points: Points, y_label: str, title: str, path: Path) -> None:
    """Draw speed against closeness to the untouched model.

    Args:
        points: (speed-ups, values) by legend. The first is drawn as a line, the others as single marks.
        y_label: What the values are.
        title: Of the picture.
        path: Where to.
    """
    write({title: partial(draw_frontier, points=points, y_label=y_label)}, (7, 4.5), path)


def draw_frontier(axis: Any, points: Points, y_label: str) -> None:
    """Draw what `frontier` describes; the last of the points is the chosen one, and stands out."""
    for index, (name, (x, y)) in enumerate(points.items()):
        colour = ACCENT if index == len(points) - 1 else INK
        mark = {"linestyle": "none", "marker": "D", "markersize": 8, "color": colour}
        axis.plot(x, y, label=name, **(mark if index else {"marker": "o", "color": MUTED}))
    axis.set(xlabel="speed-up over the untouched model", ylabel=y_label)
    axis.grid(axis="y")
    axis.legend()
