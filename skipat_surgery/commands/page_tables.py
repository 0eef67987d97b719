"""The tables of a run's page: their cells, as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..analysis.planning import block_ranges
from ..core.card import COLUMNS, cells
from ..core.config import PhiConfig, SkipatConfig
from .results import ON_CARD_ONLY

LARGE = {  # the figures that stand large, and what stands beside each
    "agreement": ("agreement", "with the {teacher} model"),
    "top1": ("top-1 accuracy", "{teacher} {untouched}"),
    "label_miou": ("mean IoU", "{teacher} {untouched}"),
    "label_map": ("mean average precision", "{teacher} {untouched}"),
    "depth_abs_rel": ("absolute relative error", "{teacher} {untouched}"),
    "depth_delta1": ("δ1", "{teacher} {untouched}"),
    "miou": ("mean IoU", "with the {teacher} model"),
    "detections": ("objects found again", "of the {teacher} model's"),
    "map_correlation": ("map correlation", "with the {teacher} model"),
    "embedding_cosine": ("embedding cosine", "with the {teacher} model"),
    "prefix_cosine": ("CLS cosine", "with the {teacher} model"),
    "patch_cosine": ("patch cosine", "with the {teacher} model"),
    "speedup": ("speed", "beside the {teacher} model"),
    "parameters": ("parameters", "{teacher} {untouched}"),
}


@dataclass(frozen=True)
class KeyFigure:
    """A figure of the best model that stands large, and what it is to be compared with."""

    title: str
    value: str
    beside: str


def key_figures(results: Mapping[str, Any]) -> list[KeyFigure]:
    """The figures of the best model that stand large: of the classes, or where there are none of the tokens."""
    best, untouched, teacher = results["best"]["figures"], results["rows"]["teacher"], teacher_of(results)
    columns = {key: (form, " %" if "%" in title else "") for key, title, form in COLUMNS}
    found = []
    for key, (title, beside) in LARGE.items():
        if key in best and not (key in ON_CARD_ONLY and {"kl", "head"} & best.keys()):
            form, unit = columns[key]
            compared = form(untouched[key]) + unit if key in untouched else ""
            words = beside.format(teacher=teacher, untouched=compared)
            found.append(KeyFigure(title, form(best[key]) + unit, words))
    return found


def teacher_of(results: Mapping[str, Any]) -> str:
    """What the page calls the model that was cut: it is the teacher, unless another was."""
    return "untouched" if results["teacher"] else "teacher"


@dataclass(frozen=True)
class Row:
    """A row of the table of stages."""

    cells: list[str]
    is_best: bool


def stages(results: Mapping[str, Any]) -> tuple[list[str], list[Row]]:
    """The header and the rows of the table of stages; the best model has its own row where it is of no stage's end."""
    best = results["best"]
    rows = dict(results["rows"])
    marked = best["stage"]
    if best["step"] not in (0, results["steps"]):
        marked, last = f"step {best['step']}", rows.pop(best["stage"], None)
        rows |= {marked: best["figures"]} | ({} if last is None else {best["stage"]: last})
    header, body = cells({**results, "rows": rows})
    return header, [Row(row, name == marked) for name, row in zip(rows, body, strict=True)]


def phis(cut: SkipatConfig) -> list[tuple[str, dict[str, str]]]:
    """The Φ of the blocks that share one, each in words."""
    blocks: dict[PhiConfig, list[int]] = {}
    for block, phi in cut.phi.items():
        blocks.setdefault(phi, []).append(block)
    return [(shown_ranges(of), described(phi)) for phi, of in blocks.items()]


def described(phi: PhiConfig) -> dict[str, str]:
    """What a Φ is, by title."""
    asks = "each patch asks" if phi.queries == "patches" else "clusters ask"
    return {
        "hidden width": f"{phi.expansion:g} × D",
        "convolution": f"{phi.kernel_size} × {phi.kernel_size}",
        "attention kept": f"1 cluster for {phi.pool} × {phi.pool} patches, {asks}" if phi.pool else "none",
        "prefix tokens": phi.prefix,
        "reads": "Z and LN(X)" if phi.reads_x else "Z",
        "channel attention": "ECA" if phi.channel_attention else "none",
    }


def history(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the course of the run."""
    points = results["history"]
    names = list(dict.fromkeys(name for point in points for name in point))
    return names, [[text(point[name]) if name in point else "" for name in names] for point in points]


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of everything in nested mappings and lists of mappings."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from leaves(entry, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def text(value: Any) -> str:
    """A recorded value, to be read."""
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(text, value)) or "none"
    return "none" if value is None else str(value)


def frontier_rows(plan: Mapping[str, Any]) -> list[Row]:
    """The points of the frontier, the paper's and the chosen one: blocks, speeds, divergence and agreement."""
    points = [("", point, None) for point in plan["frontier"]]
    points += [("paper: ", plan["paper"], plan["paper_speedup"]), ("chosen: ", plan["chosen"], plan["speedup"])]
    return [
        Row(
            [
                name + shown_ranges(map(int, point["choice"]["phi"])),
                f"{point['choice']['speedup']:.2f}×",
                "" if measured is None else f"{measured:.2f}×",
                f"{point['divergence']:.4f}",
                "–" if point["agreement"] is None else f"{100 * point['agreement']:.1f}",
            ],
            is_best=point is plan["chosen"],
        )
        for name, point, measured in points
    ]


def shown_ranges(blocks: Iterable[int]) -> str:
    """Blocks as they are read: 3–5, 8."""
    return block_ranges(blocks).replace("-", "–").replace(",", ", ")
