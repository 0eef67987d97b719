"""The model card of a cut model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub

from .auto_classes import PREFIX
from .tables import markdown_table

PAPER = "https://arxiv.org/abs/2301.02240"
COLUMNS = (
    # key, title, format
    ("top1", "top-1 %", lambda v: f"{100 * v:.2f}"),
    ("label_miou", "mIoU %", lambda v: f"{100 * v:.2f}"),
    ("label_map", "mAP %", lambda v: f"{100 * v:.2f}"),
    ("label_map50", "mAP50 %", lambda v: f"{100 * v:.2f}"),
    ("depth_mae", "MAE", lambda v: f"{v:.4g}"),
    ("depth_abs_rel", "AbsRel", lambda v: f"{v:.4f}"),
    ("depth_delta1", "δ1 %", lambda v: f"{100 * v:.2f}"),
    ("agreement", "agree %", lambda v: f"{100 * v:.2f}"),
    ("miou", "mIoU with teacher %", lambda v: f"{100 * v:.2f}"),
    ("detections", "found again %", lambda v: f"{100 * v:.2f}"),
    ("box_iou", "box IoU", lambda v: f"{v:.4f}"),
    ("map_correlation", "map correlation", lambda v: f"{v:.4f}"),
    ("relative_error", "relative error", lambda v: f"{v:.4f}"),
    ("absolute_error", "absolute error", lambda v: f"{v:.4g}"),
    ("embedding_cosine", "embedding cosine", lambda v: f"{v:.4f}"),
    ("kl", "KL", lambda v: f"{v:.4f}"),
    ("head", "distance", lambda v: f"{v:.3g}"),
    ("prefix_cosine", "CLS cosine", lambda v: f"{v:.4f}"),
    ("patch_cosine", "patch cosine", lambda v: f"{v:.4f}"),
    ("parameters", "params", lambda v: f"{v / 1e6:.2f} M"),
    ("gflops", "GFLOPs", lambda v: f"{v:.3f}"),
    ("images_per_second", "images/s", lambda v: f"{v:.0f}"),
    ("speedup", "speed", lambda v: f"{v:.2f}×"),
)
METRICS = (
    # key, the Hub's type, title
    ("top1", "accuracy", "Top-1"),
    ("label_miou", "mean_iou", "Mean IoU"),
    ("label_map", "mean_average_precision", "mAP"),
    ("depth_abs_rel", "abs_rel", "Absolute relative error"),
    ("agreement", "agreement", "Agreement with the untouched model"),
)

TASKS = {  # what the Hub calls it
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForVideoClassification": "video-classification",
    "AutoModelForSemanticSegmentation": "image-segmentation",
    "AutoModelForObjectDetection": "object-detection",
    "AutoModelForDepthEstimation": "depth-estimation",
    "AutoModelForPoseEstimation": "keypoint-detection",
    "AutoModelForZeroShotImageClassification": "zero-shot-image-classification",
}


def model_card(skipat: dict[str, Any], host: str, load_with: str) -> str:
    """A model card from what the configuration of a cut model holds.

    Args:
        skipat: What `SkipatConfig.to_dict` wrote.
        host: ``"transformers"`` or ``"timm"``.
        load_with: The class that loads the model, as `auto_classes.loader_of` gives it; unused for timm.
    """
    base, results = skipat.get("base_model"), skipat.get("results")
    name = base or "A vision transformer"
    parts = [
        f"---\n{_data(base, results, host, load_with).to_yaml()}\n---",
        f"# {name} with Skip-Attention",
        f"The attention of blocks {', '.join(skipat['phi'])} (counted from 0) of {f'`{base}`' if base else 'it'} was "
        f"replaced with the small function Φ of [Skip-Attention]({PAPER}) (SkipAT, ICLR 2024), by skipat_surgery.",
        "\n".join([*(f"- Φ of blocks {blocks}: `{phi}`" for phi, blocks in _phis(skipat).items()), *_widths(skipat)]),
        "## How it was distilled",
        _distillation(results),
        "## Load it",
        _loading(host, load_with),
    ]
    return "\n\n".join(parts) + "\n"


def write_card(folder: str | Path, card: str) -> None:
    """Write a card beside a checkpoint, unless there is one."""
    path = Path(folder) / "README.md"
    if path.parent.is_dir() and not path.exists():
        path.write_text(card, encoding="utf-8")


def cells(results: dict[str, Any], leave_out: tuple[str, ...] = ()) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the measured table; a column is there when some row has a figure for it."""
    rows = results["rows"]
    columns = [c for c in COLUMNS if c[0] not in leave_out and any(c[0] in row for row in rows.values())]
    header = ["", *(title for _, title, _ in columns)]
    names = {"teacher": "untouched"} if results.get("teacher") else {}  # the row is the model's that was cut
    body = [
        [names.get(name, name), *(form(row[key]) if key in row else "–" for key, _, form in columns)]
        for name, row in rows.items()
    ]
    return header, body


def measured_table(results: dict[str, Any]) -> str:
    """The measured table, in Markdown."""
    return markdown_table(*cells(results))


def _phis(skipat: dict[str, Any]) -> dict[str, str]:
    """The blocks that share a Φ, by that Φ."""
    blocks: dict[str, list[str]] = {}
    for index, phi in skipat["phi"].items():
        blocks.setdefault(json.dumps(phi), []).append(index)
    return {phi: ", ".join(indices) for phi, indices in blocks.items()}


def _widths(skipat: dict[str, Any]) -> list[str]:
    """A line on the MLPs that hidden units were taken out of, if there are any."""
    widths = skipat.get("mlp_widths", {})
    listed = ", ".join(f"{width:,} (block {index})" for index, width in widths.items())
    return [f"- Hidden units left to MLPs that are narrower than in the base model: {listed}"] if widths else []


def _data(base: str | None, results: dict[str, Any] | None, host: str, load_with: str) -> huggingface_hub.ModelCardData:
    measured = next(reversed((results or {}).get("rows", {"none": {}}).values()))  # the last stage
    metrics = [
        huggingface_hub.EvalResult(
            task_type=TASKS.get(load_with, "image-classification"),
            dataset_type="image-folder",
            dataset_name=Path(results["dataset"]).name,  # type: ignore[index]
            metric_type=kind,
            metric_name=name,
            metric_value=round(measured[key], 4),
        )
        for key, kind, name in METRICS
        if key in measured
    ]
    other = "image-classification" if "agreement" in measured else "image-feature-extraction"
    return huggingface_hub.ModelCardData(
        library_name=host,
        tags=["skipat", "skip-attention", "vision-transformer"],
        pipeline_tag=TASKS.get(load_with, other),
        base_model=base if base and base.count("/") == 1 and not base.startswith((".", "/")) else None,
        model_name=f"{base or 'model'}, cut" if metrics else None,
        eval_results=metrics or None,
    )


def _distillation(results: dict[str, Any] | None) -> str:
    if results is None:
        return "Nothing is recorded: the model was cut, and perhaps trained, without skipat_surgery's recipe."
    stages = ", ".join(list(results["rows"])[2:])
    trained = f"{stages} ({results['steps']} steps), in {results['seconds'] / 60:.1f} minutes"
    return (
        f"Against {_teacher(results)} on `{results['dataset']}`: {trained if stages else 'cut, not trained'}; "
        f"{_labels(results)}.\n\n{_measured(results)}"
    )


def _measured(results: dict[str, Any]) -> str:
    """The table, and how its figures came about."""
    row = results["rows"]["teacher"]
    some = "labelled" in row and row["labelled"] < row["images"]
    told = "top-1" if "top1" in row else "what labels tell"
    images = f"{row['images']} images, {told} on {row['labelled']} of them" if some else f"{row['images']} images"
    return (
        f"{measured_table(results)}\n\n"
        f"Measured on {images}, {results['machine']}, {results['precision']}; "
        "agreement, KL and cosines are those with the untouched model. "
        "Speed is that of the whole model beside the untouched one (SDPA), in one interleaved run."
        + (f"\n\nMade with\n\n```\n{results['command']}\n```" if "command" in results else "")
    )


def _teacher(results: dict[str, Any]) -> str:
    """Whom the model learned from; checkpoints before version 0.2 do not say."""
    if "teacher" not in results:
        return "a teacher"
    return f"`{results['teacher']}`" if results["teacher"] else "the untouched model"


def _labels(results: dict[str, Any]) -> str:
    """What labels were used for."""
    weight = results.get("label_weight")
    if weight and results["steps"]:
        return f"labels were learned from too, with weight {weight:g}"
    read = {"labelled", "top1"} & results["rows"]["teacher"].keys()
    measured = "labels were used for measuring only" if read else "no label was read"
    return measured if weight is not None else "whether it learned from labels is not recorded"


def _loading(host: str, load_with: str) -> str:
    if host == "timm":
        return (
            "```python\nimport skipat_surgery  # pip install skipat-surgery\nimport timm\n\n"
            'model = timm.create_model("hf-hub:REPO", pretrained=True)  # or "local-dir:PATH"\n```'
        )
    ours = load_with.startswith(PREFIX)
    home, remote = ("skipat_surgery.core.modeling", "AutoModel") if ours else ("transformers", load_with)
    return (
        f"```python\nimport skipat_surgery  # pip install skipat-surgery\nfrom {home} import {load_with}\n\n"
        f'model = {load_with}.from_pretrained("REPO_OR_PATH")\n```\n\nWithout the library, transformers\' '
        f'`{remote}.from_pretrained("REPO_OR_PATH", trust_remote_code=True)` runs the code that lies beside the '
        "weights."
    )
