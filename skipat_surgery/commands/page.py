"""``report.html``: what a run was, did and found, on one page that needs nothing else.

    python -m skipat_surgery.commands.page OUTPUT_DIR

makes the page of a run anew, from what lies in its output directory, its model, and its evaluation images.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from accelerate import Accelerator

from ..core.config import SkipatConfig
from ..tower import Tower
from . import loading
from .charts import cka_charts, course_charts, frontier_chart
from .data_uris import of_colours, of_picture
from .images import ImageItems
from .loading import LoadedModel
from .page_tables import (
    frontier_rows,
    history,
    key_figures,
    leaves,
    phis,
    shown_ranges,
    stages,
    teacher_of,
    text,
)
from .run_state import UNFINISHED, read_json
from .running import run_command
from .sources import load_labelled, load_model
from .strip import Shown, strip

NAME = "report.html"
IMAGES = 8


def written(folder: Path, host: LoadedModel, items: ImageItems, seed: int = 0) -> str:
    """Write the page of a run, and say where; or why not, as by then the run is done and kept."""
    try:
        write(folder, host, items, seed)
    except Exception as error:
        again = f"python -m skipat_surgery.commands.page {folder}"
        return f"WARNING: there is no {NAME}: {type(error).__name__}: {error}. Make it by: {again}"
    return f"Page:       {folder / NAME}"


def write(folder: Path, host: LoadedModel, items: ImageItems, seed: int = 0) -> None:
    """Write the page of a run.

    Args:
        folder: The run's output directory, with ``results.json``, ``best/`` and, where blocks were chosen by
            measuring, ``analysis.json``.
        host: The untouched model.
        items: The evaluation images.
        seed: Which of them are shown.
    """
    results, analysis = read_json(folder / "results.json"), folder / "analysis.json"
    cut = loading.load(str(folder / "best")).model.to(next(host.model.parameters()).device)
    tower = Tower.of(cut)
    shown = strip(host, cut, items, IMAGES, seed)
    measured = read_json(analysis) if analysis.exists() else {}
    head = "" if host.task is None else host.task.shown
    made = render(results, tower.config, len(tower.blocks), measured, shown, head)
    partial = folder / f"{NAME}{UNFINISHED}"
    partial.write_text(made, encoding="utf-8")
    partial.replace(folder / NAME)


def render(
    results: Mapping[str, Any],
    cut: SkipatConfig,
    depth: int,
    analysis: Mapping[str, Any] | None = None,
    shown: Sequence[Shown] = (),
    head: str = "",
) -> str:
    """The page, as HTML.

    Args:
        results: What ``results.json`` holds.
        cut: The cut of the best model.
        depth: How many blocks the model has.
        analysis: What ``analysis.json`` holds, where there is one.
        shown: The images, and what the models make of them.
        head: What the heads' pictures are of.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "picture": of_picture,
        "colours": of_colours,
        "percent": lambda share: f"{100 * share:.0f} %",
    }
    header, rows = stages(results)
    measured = analysis or {}
    plan = measured.get("plan")
    return environment.get_template("page.html.jinja").render(
        results=results,
        name=Path(results["model"]).name or results["model"],
        teacher=teacher_of(results),
        blocks=[(block, block in cut.phi) for block in range(depth)],
        ranges=shown_ranges(cut.phi),
        phis=phis(cut),
        base_model=cut.base_model,
        command=(cut.results or {}).get("command"),
        key_figures=key_figures(results),
        header=header,
        rows=rows,
        course=course_charts(results),
        history=history(results),
        frontier=plan and (frontier_chart(plan), frontier_rows(plan)),
        cka=cka_charts(measured.get("cka"), plan),
        shown=shown,
        head=head,
        recorded=[(name, text(value)) for name, value in leaves(results) if not name.startswith("history")],
    )


class Again:
    """The page of a run, made anew."""

    def __init__(self, arguments: Sequence[str]) -> None:
        if len(arguments) != 1:
            raise ValueError(f"give the output directory of one run, got {list(arguments)}")
        self.folder = Path(arguments[0])
        given = read_json(self.folder / "results.json")["arguments"]
        task, texts = given.get("task"), given.get("texts")
        self.host = load_model(given["model"], Accelerator(), self.folder, task, texts)
        self.seed = given["seed"]
        data = load_labelled(self.host, given)
        columns = data.image_column, data.label_column, self.host.image_mode
        self.items = ImageItems(data.evaluation, *columns, maps=data.maps)

    def run(self) -> None:
        """Write the page, and say where."""
        write(self.folder, self.host, self.items, self.seed)
        print(self.folder / NAME)


if __name__ == "__main__":
    run_command("page", Again, sys.argv[1:])
