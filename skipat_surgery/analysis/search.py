"""Putting scored runs of blocks together: the best set for each number of blocks and each speed.

A Φ with clusters makes Z from its own block, so runs of such may follow another at once. One that reads nothing but the
Z before it stands or falls with where that comes from: its runs start after an attended block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..core.config import PhiConfig


@dataclass(frozen=True)
class Score:
    """One run of blocks, cut alone and solved.

    Args:
        run: The blocks.
        phi: The Φ of each.
        divergence: KL to the untouched model; for a model without classes the token terms of the distillation loss.
    """

    run: tuple[int, ...]
    phi: PhiConfig
    divergence: float


@dataclass(frozen=True, eq=False)
class Choice:
    """A set of blocks with a Φ each, and what it is taken to cost.

    Args:
        phi: Φ by block.
        speedup: Predicted from what each Φ was measured to save.
        divergence: The sum of the scores of its runs; None where not all of them were scored.
    """

    phi: Mapping[int, PhiConfig]
    speedup: float
    divergence: float | None


def combine(scores: Iterable[Score], depth: int, saved: Mapping[PhiConfig, float]) -> tuple[Choice, ...]:
    """The sets of runs that no other set of as many blocks beats in both speed and divergence.

    Dynamic programming from the first block to the last: of the partial sets that end at the same block, the beaten
    ones are dropped. Runs are kept apart by at least one attended block, but that one whose Φ has clusters may follow
    another. Scores are taken to add up.

    Args:
        scores: Of single runs.
        depth: The number of blocks.
        saved: What one block with each Φ saves of the untouched model's latency, as a fraction.

    Returns:
        The sets, by number of blocks, then by divergence.
    """
    starting: dict[int, list[Score]] = {}
    for score in scores:
        starting.setdefault(score.run[0], []).append(score)
    # Sets among the blocks before i, the last of which is attended, or skipped.
    attended: list[list[_Set]] = [[] for _ in range(depth + 1)]
    skipped: list[list[_Set]] = [[] for _ in range(depth + 1)]
    attended[1] = [_Set()]
    for block in range(1, depth):
        attended[block], skipped[block] = _unbeaten(attended[block]), _unbeaten(skipped[block])
        attended[block + 1] += attended[block] + skipped[block]
        for score in starting.get(block, []):
            gain = len(score.run) * saved[score.phi]
            befores = attended[block] + (skipped[block] if score.phi.pool else [])
            skipped[score.run[-1] + 1] += [before.with_run(score, gain) for before in befores]
    complete = _unbeaten([*attended[depth], *skipped[depth]])
    return tuple(
        Choice({b: s.phi for s in found.runs for b in s.run}, 1 / (1 - found.saved), found.divergence)
        for found in sorted(complete, key=lambda found: (found.count, found.divergence))
        if found.count
    )


def unbeaten(choices: Iterable[Choice], number: int) -> tuple[Choice, ...]:
    """Of the choices that no other beats in both speed and divergence, slowest first, so many, evenly far apart."""
    front: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.divergence, -choice.speedup)):
        if not front or choice.speedup > front[-1].speedup:
            front.append(choice)
    if len(front) <= number:
        return tuple(front)
    first, last = front[0].speedup, front[-1].speedup
    wanted = [first + (last - first) * step / (number - 1) for step in range(number)]
    return tuple(dict.fromkeys(min(front, key=lambda choice: abs(choice.speedup - speed)) for speed in wanted))


def by_count(choices: Sequence[Choice]) -> dict[int, list[Choice]]:
    """The choices by their number of blocks."""
    groups: dict[int, list[Choice]] = {}
    for choice in choices:
        groups.setdefault(len(choice.phi), []).append(choice)
    return groups


@dataclass(frozen=True)
class _Set:
    """A set of runs in the making."""

    runs: tuple[Score, ...] = ()
    count: int = 0
    saved: float = 0.0
    divergence: float = 0.0

    def with_run(self, score: Score, gain: float) -> _Set:
        return _Set(
            (*self.runs, score), self.count + len(score.run), self.saved + gain, self.divergence + score.divergence
        )


def _unbeaten(sets: Iterable[_Set]) -> list[_Set]:
    """Those that no other of as many blocks beats in both speed and divergence."""
    kept: dict[int, list[_Set]] = {}
    for one in sorted(sets, key=lambda one: (one.divergence, -one.saved)):
        rivals = kept.setdefault(one.count, [])
        if not rivals or one.saved > rivals[-1].saved:
            rivals.append(one)
    return [one for group in kept.values() for one in group]
