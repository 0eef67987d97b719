"""Which blocks to skip, and with which Φ, for a budget.

Every block is cut alone, with every Φ on offer, and of a Φ that reads nothing but the Z before it every run of blocks.
It is solved in closed form, and its score is how far the model then is from the untouched one on images held out from
the fit. What a Φ saves is measured on this machine. Dynamic programming puts them together, taking scores to add up;
what it chooses is then cut, solved and measured as a whole, so that every figure of a plan was seen, not predicted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn
from tqdm.auto import tqdm

from ..core.config import PhiConfig
from ..core.stages import allowed_blocks
from ..result import Result
from ..tower import Tower
from . import plan_file
from .plan_table import block_ranges, frontier_table
from .scoring import Point, Session
from .search import Choice, Score, by_count, combine, unbeaten

# From the closest to the cheapest: what a block can be given in the place of its MSA.
OFFERS = (
    PhiConfig(),
    PhiConfig(expansion=0.125, queries="patches"),
    PhiConfig(expansion=0.125, pool=3),
    PhiConfig(expansion=0.125, pool=4),
    PhiConfig(pool=0, reads_x=False),
)
# How many points of the frontier are measured.
POINTS = 8


@dataclass(frozen=True)
class Plan(Result, Mapping[int, PhiConfig]):
    """Which blocks to skip: a mapping from block to Φ, as `apply` takes it, and the measurements that it comes from.

    Args:
        chosen: The set of blocks.
        speedup: Measured, over the untouched model with the attention it came with, side by side.
        paper: The paper's middle half of the blocks (3-8 of 12).
        paper_speedup: Measured in the same run.
        frontier: The best found at speeds evenly far apart, slowest first.
        scores: All runs that were scored.
        images: How many images fitted, and how many scored.
    """

    chosen: Point
    speedup: float
    paper: Point
    paper_speedup: float
    frontier: tuple[Point, ...]
    scores: tuple[Score, ...]
    images: tuple[int, int]

    def __getitem__(self, block: int) -> PhiConfig:
        return self.chosen.choice.phi[block]

    def __iter__(self) -> Iterator[int]:
        return iter(self.chosen.choice.phi)

    def __len__(self) -> int:
        return len(self.chosen.choice.phi)

    def table(self) -> Table:
        """The frontier, with the paper's blocks and the chosen ones: which blocks are given which Φ."""
        rows: list[tuple[str, Point, float | None]] = [("", point, None) for point in self.frontier]
        rows += [("paper", self.paper, self.paper_speedup), ("chosen", self.chosen, self.speedup)]
        return frontier_table(rows, f"Solved, not trained; scored on {self.images[1]:,} images")

    def save(self, path: str | Path) -> None:
        """Write the plan, with every figure, as JSON: for `load`, and for ``--plan`` of the commands.

        Raises:
            OSError: The file cannot be written.
        """
        plan_file.write(self.to_dict(), Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            OSError: There is no such file.
            ValueError: It holds no plan, or one of a newer version of this library.
        """
        try:
            held = json.loads(Path(path).read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        return cls.from_dict(held, str(path))

    @classmethod
    def from_dict(cls, held: Mapping[str, Any], name: str = "this") -> Plan:
        """Read what a file that `save` wrote holds; `name` is the file's, for errors.

        Raises:
            ValueError: It is no plan, or one of a newer version of this library.
        """
        return cls(**plan_file.read(held, name))

    def plot(self, path: str | Path) -> None:
        """Draw the frontier: speed against agreement, with the chosen point and the paper's marked."""
        from .pictures import frontier

        classifies = self.chosen.agreement is not None

        def line(points: Sequence[Point]) -> tuple[list[float], list[float]]:
            values = [100 * p.agreement if p.agreement is not None else p.divergence for p in points]
            return [p.choice.speedup for p in points], values

        marks = {
            "best found": line(self.frontier),
            f"the paper's {block_ranges(self.paper.choice.phi)}, measured {self.paper_speedup:.2f}×": line(
                [self.paper]
            ),
            f"chosen {block_ranges(self.chosen.choice.phi)}, measured {self.speedup:.2f}×": line([self.chosen]),
        }
        label = "agreement with the untouched model, %" if classifies else "divergence from the untouched model"
        frontier(marks, label, f"Φ solved, not trained; {self.images[1]:,} images", Path(path))


def plan(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    speedup: float | None = None,
    n_skip: int | None = None,
    max_kl: float | None = None,
    phi: PhiConfig | Sequence[PhiConfig] | None = None,
    max_run: int | None = None,
    progress: bool = True,
) -> Plan:
    """Choose which blocks of a model to skip, and the Φ of each. The model is left untouched.

    Args:
        model: An untouched model of a supported family.
        batches: Batches of images (B, C, H, W) or videos (B, T, C, H, W), ``(images, labels)`` pairs, or mappings with
            ``pixel_values``; no labels are needed. They are gone through more than once: a list or a DataLoader. Each
            fourth batch is held out from the fits and scores.
        speedup: The speed-up to reach over the untouched model; the set that diverges least is chosen.
        n_skip: The number of blocks to skip; the set that diverges least is chosen.
        max_kl: The divergence not to pass (KL for a classifier); the fastest set is chosen.
        phi: The Φ to use, or several to choose from for each block. `OFFERS` when left out.
        max_run: The longest run of a Φ without clusters to consider; half the blocks when left out.
        progress: Whether to show bars.

    Raises:
        ValueError: Not exactly one budget is given, it cannot be met, the model is cut, or there are too few images.

    Examples:
        >>> import tempfile
        >>> import timm
        >>> import torch
        >>> import skipat_surgery
        >>> small = dict(img_size=32, patch_size=8, embed_dim=32, depth=6, num_heads=2, num_classes=4)
        >>> model = timm.create_model("vit_tiny_patch16_224", **small).eval()
        >>> batches = torch.randn(64, 3, 32, 32).split(16)
        >>> plan = skipat_surgery.plan(model, batches, n_skip=2, progress=False)
        >>> len(plan)
        2
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plan.save(f"{folder}/plan.json")
        ...     dict(skipat_surgery.Plan.load(f"{folder}/plan.json")) == dict(plan)
        True
        >>> skipat_surgery.apply(model, skip=plan) is model
        True
    """
    check_budget(speedup, n_skip, max_kl)
    phis = OFFERS if phi is None else (phi,) if isinstance(phi, PhiConfig) else tuple(phi)
    depth = check_plannable(model, n_skip)
    session = Session(model, phis, batches, progress)
    scores = session.scores(max_run or max(1, depth // 2))
    choices = combine(scores, depth, session.saved)
    best = unbeaten(choices, POINTS)
    frontier = tuple(
        session.measure(choice)
        for choice in tqdm(best, desc="Measuring the frontier", unit="set", disable=not progress)
    )
    middle = dict.fromkeys(range(max(1, depth // 4), max(2, 3 * depth // 4)), phis[0])
    paper = session.measure(Choice(middle, session.predicted(middle), None))
    chosen = choose(session, choices, frontier, speedup, n_skip, max_kl)
    fast = session.speedups(chosen.choice.phi, paper.choice.phi)
    return Plan(chosen, fast[0], paper, fast[1], frontier, scores, session.images)


def check_budget(speedup: float | None, n_skip: int | None, max_kl: float | None) -> None:
    """Check that one budget is given, and that it can be one.

    Raises:
        ValueError: There is none, there are several, or it is out of range.
    """
    given = {"speedup": speedup, "n_skip": n_skip, "max_kl": max_kl}
    if sum(value is not None for value in given.values()) != 1:
        raise ValueError(f"give exactly one of speedup, n_skip and max_kl, got {given}")
    if speedup is not None and not 1 < speedup < math.inf:
        raise ValueError(f"speedup must be above 1, and finite, got {speedup}")
    if max_kl is not None and math.isnan(max_kl):
        raise ValueError("max_kl must be a number, got nan")


def check_plannable(model: nn.Module, n_skip: int | None) -> int:
    """Check that a model is untouched and deep enough; returns its number of blocks up to the last that can be skipped.

    Raises:
        ValueError: It is not.
    """
    tower = Tower.of(model)
    if tower.skip:
        raise ValueError("the model is cut; plan needs it untouched: skipat_surgery.restore(model) first")
    windowed = [index for index in range(len(tower.blocks)) if tower.gives_windows(index)]
    if tower.family.stages or (len(tower.stages) > 1 and not windowed):
        listed = allowed_blocks(tower.stages)
        raise ValueError(
            "plan takes what a Φ saves to be the same in every block, but this model has stages, whose blocks cost "
            f"unlike; choose by hand: apply(model, skip=…), where {listed} are allowed"
        )
    if windowed:
        whole = [index for index in tower.skippable if index not in windowed]
        raise ValueError(
            f"plan takes what a Φ saves to be the same in every block, but of this model {windowed} attend within "
            f"windows, which costs little; choose by hand, best among the global blocks: apply(model, skip={whole})"
        )
    depth = tower.reach
    if n_skip is not None and not 1 <= n_skip < depth:
        raise ValueError(f"n_skip must be from 1 to {depth - 1} for {depth} blocks, got {n_skip}")
    return depth


def choose(
    session: Session,
    choices: Sequence[Choice],
    frontier: Sequence[Point],
    speedup: float | None,
    n_skip: int | None,
    max_kl: float | None,
) -> Point:
    """The point that meets the one budget that is given best.

    Raises:
        ValueError: None meets it; with the nearest there is.
    """
    if n_skip is not None:
        met = by_count(choices).get(n_skip)  # in order of divergence
        if not met:
            raise ValueError(f"no set of {n_skip} blocks is made of runs this short: give a larger max_run")
        return session.measure(met[0])
    if max_kl is not None:
        within = [point for point in frontier if point.divergence <= max_kl]
        if not within:
            least = min(point.divergence for point in frontier)
            raise ValueError(f"max_kl={max_kl} cannot be kept: the least that was found is {least:.4f}")
        return max(within, key=lambda point: point.choice.speedup)
    assert speedup is not None
    fast = [choice for choice in choices if choice.speedup >= speedup]
    if not fast:
        most = max(choice.speedup for choice in choices)
        raise ValueError(
            f"speedup={speedup} is out of reach: {most:.2f} is the most that skipping blocks gives on this machine; a "
            "narrower Φ, a larger image or a lower budget may help"
        )
    return session.measure(min(fast, key=lambda choice: choice.divergence or 0.0))
