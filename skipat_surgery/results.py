"""What a distillation shows in the end: a table, a picture of its course, a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
from rich import box
from rich.table import Table

PAPER = "https://arxiv.org/abs/2301.02240"
COLUMNS = (
    # key, title, format
    ("top1", "top-1 %", lambda v: f"{100 * v:.2f}"),
    ("agreement", "agree %", lambda v: f"{100 * v:.2f}"),
    ("kl", "KL", lambda v: f"{v:.4f}"),
    ("prefix_cosine", "CLS cosine", lambda v: f"{v:.4f}"),
    ("patch_cosine", "patch cosine", lambda v: f"{v:.4f}"),
    ("parameters", "params", lambda v: f"{v / 1e6:.2f} M"),
    ("gflops", "GFLOPs", lambda v: f"{v:.3f}"),
    ("images_per_second", "images/s", lambda v: f"{v:.0f}"),
    ("speedup", "speed", lambda v: f"{v:.2f}×"),
)
ON_CARD_ONLY = ("prefix_cosine", "patch_cosine")


def cells(results: dict[str, Any], leave_out: tuple[str, ...] = ()) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the final table; a column is there when some row has a figure for it."""
    rows = results["rows"]
    columns = [c for c in COLUMNS if c[0] not in leave_out and any(c[0] in row for row in rows.values())]
    header = ["", *(title for _, title, _ in columns)]
    body = [[name, *(form(row[key]) if key in row else "–" for key, _, form in columns)] for name, row in rows.items()]
    return header, body


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


def markdown(results: dict[str, Any]) -> str:
    """The final table for a model card."""
    header, body = cells(results)
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def title(results: dict[str, Any]) -> str:
    """What was measured on what."""
    return (
        f"{results['model']}, blocks {results['skip']} skipped; {results['rows']['teacher']['images']} images of "
        f"{results['dataset']}; {results['machine']}, {results['precision']}"
    )


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the loss and the measured agreement, or the cosine where there are no classes, over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    losses = [point for point in results["history"] if "loss" in point]
    measured = [point for point in results["history"] if "patch_cosine" in point]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot([p["step"] for p in losses], [p["loss"] for p in losses])
    left.set(xlabel="step", ylabel="loss", title="Distillation loss")
    minutes = [p["seconds"] / 60 for p in measured]
    names = {"top1": "top-1", "agreement": "agreement with the teacher", "prefix_cosine": "CLS cosine"}
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


def model_card(results: dict[str, Any], command: str) -> huggingface_hub.ModelCard:
    """A model card with the measured figures, to be saved or pushed."""
    distilled = results["rows"]["distilled"]
    metrics = [
        huggingface_hub.EvalResult(
            task_type="image-classification",
            dataset_type="image-folder",
            dataset_name=Path(results["dataset"]).name,
            metric_type=kind,
            metric_name=name,
            metric_value=round(distilled[key], 4),
        )
        for key, kind, name in (("top1", "accuracy", "Top-1"), ("agreement", "agreement", "Agreement with the teacher"))
        if key in distilled
    ]
    data = huggingface_hub.ModelCardData(
        library_name="timm" if results["host"] == "timm" else "transformers",
        tags=["skipat", "skip-attention", "vision-transformer"],
        pipeline_tag="image-classification" if "agreement" in distilled else "image-feature-extraction",
        model_name=f"{results['model']}, cut" if metrics else None,
        eval_results=metrics or None,
    )
    loading = {
        "timm": 'import timm\n\nmodel = timm.create_model("local-dir:PATH", pretrained=True)  # or "hf-hub:REPO"',
        "transformers": f"from transformers import {results['auto_class']}\n\n"
        f'model = {results["auto_class"]}.from_pretrained("PATH_OR_REPO")',
    }[results["host"]]
    content = f"""---
{data.to_yaml()}
---

# {results["model"]} with Skip-Attention

The attention of blocks {results["skip"]} (counted from 0) of `{results["model"]}` was replaced with the small
function Φ of [Skip-Attention]({PAPER}), by skipat_surgery, and distilled against the untouched model on
`{results["dataset"]}` for {results["steps"]} steps in {results["seconds"] / 60:.1f} minutes. Labels were used for
measuring only.

Φ: `{results["phi"]}`.

{markdown(results)}

Measured on {results["rows"]["teacher"]["images"]} images, {results["machine"]}, {results["precision"]}. Speed is that
of the whole model beside the untouched one (SDPA), in one interleaved run.

## Load it

```python
import skipat_surgery  # pip install skipat-surgery

{loading.replace(chr(10) + chr(10), chr(10))}
```

## Made with

```
{command}
```
"""
    return huggingface_hub.ModelCard(content)
