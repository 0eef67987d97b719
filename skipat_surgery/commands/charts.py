"""The charts of a run's page, each a drawing with a title and what is to be said of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from markupsafe import Markup

from ..analysis import pictures
from . import results as figures
from .page_tables import shown_ranges

SIZE, SQUARE = (5.2, 3.3), (4.2, 4.1)  # inches: so that the text is of one size, on a wide page and on a phone


@dataclass(frozen=True)
class Chart:
    """A chart on the page.

    Args:
        svg: The drawing.
        title: What is drawn.
        caption: How it is to be read.
    """

    svg: Markup
    title: str
    caption: str = ""


def course_charts(results: Mapping[str, Any]) -> list[Chart]:
    """The loss, and what was measured while the model was trained; none where it was not."""
    if not results["steps"]:
        return []
    found = []
    if any("loss" in point for point in results["history"]):
        found.append(_chart(partial(figures.draw_losses, results=results), SIZE, "Distillation loss"))
    draw = partial(figures.draw_figures, results=results)
    return [*found, _chart(draw, SIZE, "Figures on the evaluation images", "Dotted: cut, not trained.")]


def cka_charts(cka: Mapping[str, Any] | None, plan: Mapping[str, Any] | None) -> list[Chart]:
    """CKA, as far as it was measured, with the blocks that were chosen marked."""
    marked = set(_blocks(plan["chosen"])) if plan else set()
    found = []
    for key, name in (("cls_attention", "CKA of A[CLS], how CLS attends"), ("msa", "CKA of Z, the MSA's output")):
        if cka and cka.get(key):
            matrix = torch.tensor([[torch.nan if v is None else v for v in row] for row in cka[key]])
            draw = partial(pictures.draw_heatmap, matrix=matrix, marked=marked)
            caption = f"How alike two blocks are, up to rotation and scale: 1 is the same. {cka['images']:,} images."
            found.append(_chart(draw, SQUARE, name, caption))
    return found


def frontier_chart(plan: Mapping[str, Any]) -> Chart:
    """Speed against closeness, of the sets of blocks that no other beats."""
    classifies = plan["chosen"]["agreement"] is not None

    def line(points: list[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
        values = [100 * point["agreement"] if classifies else point["divergence"] for point in points]
        return [point["choice"]["speedup"] for point in points], values

    chosen, paper = plan["chosen"], plan["paper"]
    points = {
        "best found": line(plan["frontier"]),
        f"the paper's {shown_ranges(_blocks(paper))}": line([paper]),
        f"chosen: {shown_ranges(_blocks(chosen))}": line([chosen]),
    }
    label = "agreement, %" if classifies else "divergence"
    caption = (
        f"Φ solved, not trained; {plan['images'][1]:,} images. Speed is predicted from what each Φ saves; measured "
        f"as a whole, the chosen blocks give {plan['speedup']:.2f}×, the paper's {plan['paper_speedup']:.2f}×."
    )
    draw = partial(pictures.draw_frontier, points=points, y_label=label)
    return _chart(draw, SIZE, "Speed against closeness to the untouched model", caption)


def _blocks(point: Mapping[str, Any]) -> list[int]:
    return sorted(map(int, point["choice"]["phi"]))


def _chart(draw: Any, size: tuple[float, float], title: str, caption: str = "") -> Chart:
    return Chart(Markup(pictures.as_svg(draw, size, f"{title}. {caption}".strip())), title, caption)
