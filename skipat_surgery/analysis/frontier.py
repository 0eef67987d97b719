"""Quality against speed: cuts beside what a user would take instead, all measured side by side on one machine.

Cuts are those of a plan's frontier. Beside them: token merging (ToMe), cuts that work on merged tokens, and where their
libraries are installed MLPs narrowed by magnitude and dynamic int8. Nothing is trained; cuts are solved.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..convert.narrow import narrow
from ..convert.solve import solve
from ..core.config import PhiConfig
from ..core.finding import find_tower
from ..core.tables import markdown_table
from ..measure.alternatives import int8, prune
from ..measure.counting import gflops
from ..measure.timing import Estimate, latencies
from ..measure.token_merging import check_merging, merge_tokens
from ..observing import Outputs, evaluating, outputs_of, pixels_of
from ..result import Result
from ..surgery import apply
from ..tower import Tower
from .plan_table import spelt_out
from .planning import Plan
from .scoring import split

CUT, NARROW, MERGED, BOTH = "cut", "cut and narrower MLPs", "token merging", "cut and token merging"
PRUNED, INT8 = "MLP pruning", "int8"
# The share of the patches that merging does away with by the last block; the share of GFLOPs that pruning saves.
SHARES = (0.2, 0.4, 0.6, 0.8)
SAVINGS = (0.1, 0.2, 0.3)
KEPT = (0.85, 0.7, 0.55)  # of the MLPs of a cut model
UNTOUCHED = "untouched"


@dataclass(frozen=True)
class Contender:
    """One model on the picture.

    Args:
        kind: What was done to it.
        name: How much of it.
        kept: What it keeps of the untouched model, from 0 to 1: the share of images put in the same class, or without
            classes the mean cosine of the patch tokens.
        speed: How many times as fast as the untouched model it is.
    """

    kind: str
    name: str
    kept: float
    speed: Estimate


@dataclass(frozen=True)
class Frontier(Result):
    """What is kept at which speed, of every contender.

    Args:
        contenders: In order of their kinds.
        measure: What `Contender.kept` is.
        images: How many it was measured on.
        left_out: Kinds that could not take part, with the reason.
    """

    contenders: tuple[Contender, ...]
    measure: str
    images: int
    left_out: tuple[str, ...]

    def fastest(self, kind: str, loss: float) -> Contender | None:
        """The fastest contender of a kind that loses no more than that; None where none gains any speed."""
        within = [one for one in self.contenders if one.kind == kind and one.kept >= 1 - loss and one.speed.value > 1]
        return max(within, key=lambda one: one.speed.value, default=None)

    def verdict(self, loss: float = 0.005) -> str:
        """One sentence: which kind is ahead where no more than that share may be lost."""
        found = [self.fastest(kind, loss) for kind in dict.fromkeys(one.kind for one in self.contenders)]
        best = sorted((one for one in found if one is not None), key=lambda one: -one.speed.value)
        if not best:
            return f"At {loss:.1%} loss nothing is faster than the untouched model."
        first, *others = [f"{one.kind} ({one.name}) {one.speed.value:.2f}×" for one in best]
        return f"At {loss:.1%} loss {first} is ahead" + (f"; then {', '.join(others)}." if others else ".")

    def table(self) -> Table:
        """A row for each contender."""
        shown = Table(title=self.verdict(), title_justify="left", box=box.SIMPLE_HEAD)
        for name, justify in (("", "left"), ("", "left"), ("speed", "right"), (self.measure, "right")):
            shown.add_column(name, justify=justify)  # type: ignore[arg-type]
        for cells in self._cells():
            shown.add_row(*cells)
        return shown

    def markdown(self) -> str:
        """For a page."""
        return markdown_table(["", "how much", "speed", self.measure], self._cells())

    def _cells(self) -> list[list[str]]:
        return [[one.kind, one.name, one.speed.as_speed(), f"{one.kept:.4f}"] for one in self.contenders]

    def plot(self, path: str | Path) -> None:
        """Draw quality against speed, a line for each kind."""
        from .pictures import draw_frontier, write

        points = {}
        for kind in dict.fromkeys(one.kind for one in self.contenders):
            own = sorted((one.speed.value, one.kept) for one in self.contenders if one.kind == kind)
            points[kind] = ([speed for speed, _ in own], [kept for _, kept in own])
        chart = partial(draw_frontier, points=dict(reversed(points.items())), y_label=self.measure)
        write({f"Untrained; {self.images:,} images": chart}, (7, 4.5), path)


def frontier(
    model: nn.Module, batches: Iterable[Any], plan: Plan, *, rounds: int = 25, progress: bool = True
) -> Frontier:
    """Measure what a model keeps at which speed: cut as a plan's frontier says, and made faster in other ways.

    Args:
        model: Untouched; it stays so.
        batches: Image batches; each fourth is measured on, the others solve the cuts.
        plan: Of this model.
        rounds: How often each contender is timed, on the first batch that is measured on, all by turns.
        progress: Whether to show bars.

    Raises:
        TypeError: The batches hold patches, with a grid for each image.
    """
    device = next(model.parameters()).device
    fit, held_out = split([_images_of(batch).to(device) for batch in batches])
    makers = _Makers(model, plan, fit, held_out[0])
    made: dict[tuple[str, str], nn.Module] = {}
    left_out = []
    for kind, make in makers.kinds().items():
        try:
            for name, own in tqdm(make(), desc=kind, unit="model", disable=not progress, leave=False):
                made[kind, name] = own
        except (ImportError, ValueError) as error:
            left_out.append(f"{kind}: {error}")
    with evaluating(model, *made.values()):
        kept = _kept(model, made, held_out)
        calls = {UNTOUCHED: partial(model, held_out[0])}
        for (kind, name), own in made.items():
            call = torch.compile(own, dynamic=False) if kind == INT8 else own
            calls[f"{kind} {name}"] = partial(call, held_out[0])
        seconds = latencies(calls, device, rounds, progress=progress)
    contenders = tuple(
        Contender(*key, kept[key], Estimate.of_speed(seconds[UNTOUCHED], seconds[" ".join(key)])) for key in made
    )
    measure = "patch cosine" if plan.chosen.agreement is None else "agreement"
    return Frontier(contenders, measure, sum(map(len, held_out)), tuple(left_out))


Made = Iterator[tuple[str, nn.Module]]


class _Makers:
    """How to make the contenders of each kind, by name.

    Args:
        model: Untouched.
        plan: Whose frontier is cut.
        fit: Batches to solve cuts on.
        images: A batch (B, C, H, W).
    """

    def __init__(self, model: nn.Module, plan: Plan, fit: Sequence[Tensor], images: Tensor) -> None:
        self.model, self.fit, self.images = model, fit, images
        self.cuts = {spelt_out(point.choice.phi): point.choice.phi for point in plan.frontier}
        tower = Tower.of(model)
        patches, depth = math.prod(tower.grid(images)), len(tower.blocks)
        self.rates = {f"{share:.0%} of the patches": round(share * patches / depth) for share in SHARES}

    def kinds(self) -> dict[str, Callable[[], Made]]:
        """By kind, what makes its contenders."""
        return {
            MERGED: self.merged,
            BOTH: self.both,
            PRUNED: self.pruned,
            INT8: self.int8,
            NARROW: self.narrow,
            CUT: self.cut,
        }

    def merged(self) -> Made:
        check_merging(self.model, self.images)
        for name, r in self.rates.items():
            yield name, merge_tokens(self.model, r)

    def both(self) -> Made:
        check_merging(self.model, self.images)
        blocks, phis = next(iter(self.cuts.items()))  # the frontier's slowest: merging does the rest
        student = self.solved({block: replace(phi, kernel_size=1) for block, phi in phis.items()})
        for name, r in self.rates.items():
            yield f"{blocks}, {name}", merge_tokens(student, r)

    def pruned(self) -> Made:
        whole = gflops(self.model)
        for share in SAVINGS:
            yield f"{share:.0%} of the GFLOPs", prune(self.model, self.images[:1], share * whole)

    def int8(self) -> Made:
        yield "all Linears", int8(self.model)

    def narrow(self) -> Made:
        blocks, phis = next(iter(self.cuts.items()))
        student = self.solved(phis)
        for keep in KEPT:
            own = copy.deepcopy(student)
            narrow(own, self.model, self.fit, keep, progress=False)
            yield f"{blocks}, {keep:.0%} of the MLPs", own

    def cut(self) -> Made:
        for blocks, phis in self.cuts.items():
            yield blocks, self.solved(phis)

    def solved(self, phis: Mapping[int, PhiConfig]) -> nn.Module:
        """A copy, cut and solved."""
        student = apply(copy.deepcopy(self.model), phis, keep_removed=False)
        solve(student, self.model, self.fit, progress=False)
        return student


def _images_of(batch: Any) -> Tensor:
    images = pixels_of(batch)
    if not isinstance(images, Tensor):
        raise TypeError("a frontier is measured on images (B, C, H, W) of one size, and these are patches of any size")
    return images


def _kept(
    model: nn.Module, made: Mapping[tuple[str, str], nn.Module], batches: Sequence[Tensor]
) -> dict[tuple[str, str], float]:
    """Of each contender, agreement of classes or the cosine of the patch tokens with the untouched model."""
    path, _, _ = find_tower(model)
    tower = Tower.of(model)
    expected = [outputs_of(model, tower, images) for images in batches]

    def of(own: nn.Module) -> float:
        mine = replace(tower, module=own.get_submodule(path))  # one whose tokens merge is of no family any more
        each = zip(batches, expected, strict=True)
        found = [_alike(outputs_of(own, mine, images), known, tower.num_special_tokens) for images, known in each]
        return float(torch.cat(found).double().mean())

    return {key: of(own) for key, own in made.items()}


def _alike(found: Outputs, expected: Outputs, special: int) -> Tensor:
    if found.logits is not None and expected.logits is not None:
        return found.logits.argmax(dim=-1) == expected.logits.argmax(dim=-1)
    return F.cosine_similarity(found.tokens[:, special:], expected.tokens[:, special:], dim=-1).mean(dim=1)
