"""What a distillation shows in the end: a table and a picture of its course."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ..analysis.pictures import pyplot
from ..core.card import cells

ON_CARD_ONLY = ("prefix_cosine", "patch_cosine")


def table(results: dict[str, Any]) -> Table:
    """The final table for the terminal."""
    classifies = "agreement" in results["rows"]["teacher"]
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
    return {**row, "top1": figures["teacher_top1"]} if "teacher_top1" in figures else row


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
    shown = {"agreement": "agreement", "prefix_cosine": "CLS cosine", "patch_cosine": "patch cosine"}
    figure = next(f"{title} {best['figures'][key]:.4f}" for key, title in shown.items() if key in best["figures"])
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
    """Draw the loss and the measured agreement, or the cosine where there are no classes, over time."""
    plt = pyplot()
    losses = [point for point in results["history"] if "loss" in point]
    measured = [point for point in results["history"] if "patch_cosine" in point]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot([p["step"] for p in losses], [p["loss"] for p in losses])
    left.set(xlabel="step", ylabel="loss", title="Distillation loss")
    minutes = [p["seconds"] / 60 for p in measured]
    names = {"top1": "top-1", "agreement": "agreement with the untouched model", "prefix_cosine": "CLS cosine"}
    shown = [
        key for key in names if key in measured[-1] and (key != "prefix_cosine" or "agreement" not in measured[-1])
    ]
    for color, key in zip(("C0", "C1", "C2"), shown, strict=False):
        right.plot(minutes, [100 * p[key] for p in measured], "o-", color=color, label=names[key])
        right.axhline(100 * results["rows"]["cut"][key], color=color, linestyle=":", linewidth=1)
    if "top1" in results["rows"]["teacher"]:
        right.axhline(100 * results["rows"]["teacher"]["top1"], color="C0", linestyle="--", label="teacher's top-1")
    right.set(
        xlabel="minutes of solving and training", ylabel="%", title="On the evaluation split (dotted: cut, not trained)"
    )
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
