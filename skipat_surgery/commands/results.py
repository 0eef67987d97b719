"""What a distillation shows in the end: a table and a picture of its course."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ..analysis import pictures
from ..convert.evaluation import OF_TEACHER
from ..core.card import cells

ON_CARD_ONLY = ("prefix_cosine", "patch_cosine")  # where a head says more
# What tells most of a model, the first that there is.
TELLING = {
    "agreement": "agreement",
    "detections": "objects found again",
    "map_correlation": "map correlation",
    "embedding_cosine": "embedding cosine",
    "prefix_cosine": "CLS cosine",
    "patch_cosine": "patch cosine",
}
# What is drawn over time, the first two that there are.
OF_CLASSES = {
    "agreement": "agreement with the untouched model",
    "top1": "top-1",
    "label_miou": "mIoU",
    "label_map": "mAP",
    "depth_delta1": "δ1",
    "miou": "mIoU with the untouched model",
}
BY_LABEL = {"top1", "label_miou", "label_map", "depth_delta1"}  # shares that labels tell, of the teacher too
CURVES = OF_CLASSES | {key: name for key, name in TELLING.items() if key not in OF_CLASSES}


def table(results: dict[str, Any]) -> Table:
    """The final table for the terminal."""
    classifies = any({"kl", "head"} & row.keys() for row in results["rows"].values())
    header, body = cells(results, ON_CARD_ONLY if classifies else ())
    shown = Table(title=title(results), title_justify="left", box=box.SIMPLE_HEAD)
    for index, name in enumerate(header):
        shown.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in body:
        shown.add_row(*row)
    return shown


def of_teacher(figures: dict[str, float]) -> dict[str, float]:
    """The row of the untouched model, from the figures of one that was measured against it."""
    row = {"agreement": 1.0, "images": figures["images"]} if "agreement" in figures else {"images": figures["images"]}
    own = {name.removeprefix(OF_TEACHER): value for name, value in figures.items() if name.startswith(OF_TEACHER)}
    return {**row, **own, "labelled": figures["labelled"]} if own else row


def of_checkpoint(results: dict[str, Any], name: str) -> dict[str, Any]:
    """What the configuration and the card of ``best`` or ``last`` hold: its own figures, and not the run's course."""
    own = {key: value for key, value in results.items() if key not in ("history", "arguments", "best")}
    if name == "last":
        return own
    best = results["best"]
    names = list(results["rows"])
    before = names[: names.index(best["stage"])]
    rows = {**{row: results["rows"][row] for row in before}, best["stage"]: best["figures"]}
    if best["step"] != results["steps"]:
        del own["reload_difference"]
    return {**own, "rows": rows, "steps": best["step"], "seconds": best["seconds"]}


def places(results: dict[str, Any], folder: Path) -> str:
    """Where everything lies, and what was checked of it."""
    best = results["best"]
    which = f"step {best['step']}" if best["step"] else best["stage"]
    figure = next(f"{title} {best['figures'][key]:.4f}" for key, title in TELLING.items() if key in best["figures"])
    return (
        f"Saved, reloaded in a new process, largest difference in the outputs: {results['reload_difference']:.2g}\n"
        f"Checkpoint: {folder / 'last'}\n"
        f"Best:       {folder / 'best'} ({which}: {figure} on {best['figures']['images']} images)\n"
        f"Picture:    {folder / 'curve.png'}\nFigures:    {folder / 'results.json'}"
    )


def title(results: dict[str, Any]) -> str:
    """What was measured on what."""
    return (
        f"{results['model']}, blocks {results['skip']} skipped; {results['rows']['teacher']['images']} images of "
        f"{results['dataset']}; {results['machine']}, {results['precision']}"
    )


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the loss and the measured agreement, or the cosines where there are no classes, over time."""
    charts = {
        "Distillation loss": partial(draw_losses, results=results),
        "On the evaluation split (dotted: cut, not trained)": partial(draw_figures, results=results),
    }
    pictures.write(charts, (5, 4), path)


def draw_losses(axis: Any, results: Mapping[str, Any]) -> None:
    """Draw the loss over the steps."""
    losses = [point for point in results["history"] if "loss" in point]
    axis.plot([p["step"] for p in losses], [p["loss"] for p in losses], marker="o" if len(losses) == 1 else None)
    axis.set(xlabel="step", ylabel="loss")
    axis.locator_params(axis="x", integer=True)


def draw_figures(axis: Any, results: Mapping[str, Any]) -> None:
    """Draw what was measured over time, with what the teacher and the cut model give as lines."""
    measured = [point for point in results["history"] if "patch_cosine" in point]
    shown = [key for key in CURVES if key in measured[-1]][:2]
    for color, key in zip((pictures.ACCENT, pictures.INK), shown, strict=False):
        points = [p for p in measured if key in p]  # a sample may hold no image with a label
        axis.plot(
            [p["seconds"] / 60 for p in points], [100 * p[key] for p in points], "o-", color=color, label=CURVES[key]
        )
        axis.axhline(100 * results["rows"]["cut"][key], color=color, linestyle=":", linewidth=1)
    for key in BY_LABEL & results["rows"]["teacher"].keys():
        best = 100 * results["rows"]["teacher"][key]
        axis.axhline(best, color=pictures.MUTED, linestyle="--", linewidth=1, label=f"teacher's {CURVES[key]}")
    axis.set(xlabel="minutes of solving and training", ylabel="%")
    axis.grid(axis="y")
    axis.legend()


def versions() -> dict[str, str]:
    """What a run was made with."""
    found = {"Python": platform.python_version()}
    for name in ("skipat-surgery", "torch", "transformers", "timm"):
        with contextlib.suppress(metadata.PackageNotFoundError):  # a clone need not be installed
            found[name] = metadata.version(name)
    return found
