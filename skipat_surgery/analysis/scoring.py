"""How far a model is from the untouched one once blocks are cut and solved, and what each Φ saves: all measured."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..convert.losses import LossWeights, distances
from ..convert.solve import check_enough, phi_of, solve, solve_block
from ..convert.states import walks
from ..core.config import PhiConfig
from ..measure.timing import throughput
from ..observing import Outputs, evaluating, outputs_of, pixels_of
from ..surgery import apply, restore
from ..tower import Tower
from .search import Choice, Score

Batch = TypeVar("Batch")
HELD_OUT = 4  # each fourth batch scores, the others fit


@dataclass(frozen=True)
class Point:
    """A choice that was cut, solved as a whole, and measured on the held-out images.

    Args:
        choice: What was cut.
        divergence: As in `Score`.
        agreement: The share of images put in the same class; None for a model without classes.
    """

    choice: Choice
    divergence: float
    agreement: float | None


class Session:
    """A model being planned, a copy of it to cut, and the images.

    Args:
        model: Untouched; it stays so.
        phis: The Φ to choose from.
        batches: Image batches; each fourth is held out from the fits, and scores.
        progress: Whether to show bars.

    Raises:
        ValueError: There are too few images to fit.
    """

    def __init__(self, model: nn.Module, phis: Sequence[PhiConfig], batches: Iterable[Any], progress: bool) -> None:
        self.progress = progress
        self.model, self.copy, self.phis = model, copy.deepcopy(model), phis
        device = next(model.parameters()).device
        every = [pixels_of(batch).to(device) for batch in batches]
        self.fit, self.held_out = split(every)
        self.images = sum(map(len, self.fit)), sum(map(len, self.held_out))
        check_offers(self.copy, phis, self.images[0])
        tower = Tower.of(model)
        with evaluating(model):
            self.expected = [outputs_of(model, tower, batch) for batch in self.held_out]
        self.saved = self._savings()

    def _savings(self) -> dict[PhiConfig, float]:
        """What one skipped block saves of the untouched model's latency, by Φ, all timed side by side."""
        depth = Tower.of(self.model).reach
        rivals = {"full": self.model}
        for index, phi in enumerate(self.phis):
            rivals[str(index)] = apply(copy.deepcopy(self.model), range(1, depth), phi)
        speed = throughput(rivals, self.held_out[0])
        return {phi: (1 - speed["full"] / speed[str(index)]) / (depth - 1) for index, phi in enumerate(self.phis)}

    def predicted(self, phi: Mapping[int, PhiConfig]) -> float:
        """The speed-up that the savings of its blocks add up to."""
        return 1 / (1 - sum(self.saved[config] for config in phi.values()))

    def scores(self, max_run: int) -> tuple[Score, ...]:
        """Cut and solve every run of blocks alone, with every Φ, and see how far the model then is.

        Of a Φ with clusters, which makes Z from its own block, single blocks: runs of them are put together.
        """
        found: list[Score] = []
        depth = Tower.of(self.model).reach
        with (
            evaluating(self.model, self.copy),
            tqdm(total=depth - 1, desc="Scoring runs", unit="start", disable=not self.progress) as bar,
        ):
            for first in range(1, depth):
                reach = tuple(range(first, min(depth, first + max_run)))
                for phi in self.phis:
                    run = reach[:1] if phi.pool else reach
                    solved = self.solved(run, phi)
                    for end in range(1, len(run) + 1):
                        cut = Tower.of(apply(self.copy, run[:end], phi))
                        for index in run[:end]:
                            phi_of(cut, index).load_state_dict(solved[index])
                        found.append(Score(run[:end], phi, self.distance()[0]))
                        restore(self.copy)
                bar.update()
        return tuple(found)

    def solved(self, run: Sequence[int], phi: PhiConfig) -> dict[int, dict[str, Tensor]]:
        """The weights of every Φ of a run, solved in order: no Φ depends on a later one."""
        cut = Tower.of(apply(self.copy, run, phi))
        mine, theirs = walks(cut, Tower.of(self.model), self.fit, progress=False)
        for _ in run:
            solve_block(mine, theirs)
        weights = {index: phi_of(cut, index).state_dict() for index in run}
        restore(self.copy)
        return weights

    def measure(self, choice: Choice) -> Point:
        """Cut a set of blocks, solve its Φs as a whole, and measure it."""
        apply(self.copy, choice.phi)
        solve(self.copy, self.model, self.fit, progress=False)
        divergence, agreement = self.distance()
        restore(self.copy)
        return Point(choice, divergence, agreement)

    def distance(self) -> tuple[float, float | None]:
        """How far the copy, as it is cut, is from the model on the held-out images; and its agreement."""
        torch.clear_autocast_cache()
        tower = Tower.of(self.copy)
        values: list[Tensor] = []
        same: list[Tensor] = []
        with evaluating(self.copy):
            for images, expected in zip(self.held_out, self.expected, strict=True):
                found = outputs_of(self.copy, tower, images)
                values.append(divergence_of(found, expected, tower.num_special_tokens))
                if found.logits is not None and expected.logits is not None:
                    same.append(found.logits.argmax(dim=-1) == expected.logits.argmax(dim=-1))
        return float(torch.cat(values).mean()), float(torch.cat(same).double().mean()) if same else None

    def speedups(self, *sets: Mapping[int, PhiConfig]) -> list[float]:
        """The measured speed-up of cut models over the untouched one, side by side."""
        rivals = {"full": self.model, **{str(i): apply(copy.deepcopy(self.model), s) for i, s in enumerate(sets)}}
        speed = throughput(rivals, self.held_out[0])
        return [speed[str(i)] / speed["full"] for i in range(len(sets))]


def split(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Those that fit, and those that are held out: each fourth, or the last where there are fewer."""
    held_out = set(range(HELD_OUT - 1, len(batches), HELD_OUT)) or {len(batches) - 1}
    fit = [batch for number, batch in enumerate(batches) if number not in held_out]
    return fit, [batches[number] for number in sorted(held_out) if number >= 0]


def check_offers(model: nn.Module, phis: Sequence[PhiConfig], images: int) -> None:
    """Check that a model can be given each of several Φ's, and that so many images are enough to solve them.

    Args:
        model: Untouched; it is cut and restored.
        phis: The Φ's.
        images: How many there are to fit.

    Raises:
        ValueError: It cannot, or they are too few.
    """
    for phi in phis:
        apply(model, [1], phi)
        try:
            check_enough(images, model)
        finally:
            restore(model)


def num_fitting(images: int, batch_size: int) -> int:
    """How many of so many images fit, where they come in such batches; the others are held out."""
    sizes = [min(batch_size, images - first) for first in range(0, images, batch_size)]
    return sum(split(sizes)[0])


def divergence_of(found: Outputs, expected: Outputs, num_prefix_tokens: int) -> Tensor:
    """The term of the models' task for each image (B,), or without one the token terms of the distillation loss."""
    terms = distances(found, expected, num_prefix_tokens)
    task = found.task
    return terms[task.term] if task is not None and task.term in terms else LossWeights().of(terms)
