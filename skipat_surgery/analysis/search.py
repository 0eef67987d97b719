"""Putting scored runs of blocks together: the best set for each number of blocks and each speed."""

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


@dataclass(frozen=True)
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

    Dynamic programming from the first block to the last: runs are kept apart by at least one attended block, and of the
    partial sets that end at the same block, the beaten ones are dropped. Scores are taken to add up.

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
    # partial[i]: the sets among the blocks before i, where block i may start a run as block i - 1 is attended.
    partial: list[list[_Set]] = [[] for _ in range(depth + 2)]
    partial[1] = [_Set()]
    for block in range(1, depth):
        partial[block] = _unbeaten(partial[block])
        partial[block + 1] += partial[block]
        for score in starting.get(block, []):
            after = min(score.run[-1] + 2, depth + 1)
            gain = len(score.run) * saved[score.phi]
            partial[after] += [before.with_run(score, gain) for before in partial[block]]
    complete = _unbeaten([*partial[depth], *partial[depth + 1]])
    return tuple(
        Choice({b: s.phi for s in found.runs for b in s.run}, 1 / (1 - found.saved), found.divergence)
        for found in sorted(complete, key=lambda found: (found.count, found.divergence))
        if found.count
    )


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
        if all(one.saved > rival.saved for rival in rivals):
            rivals.append(one)
    return [one for group in kept.values() for one in group]
