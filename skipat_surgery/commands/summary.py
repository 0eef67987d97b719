"""What a data set was found to hold, in words, before any work begins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from datasets import Dataset

from ..tasks.labels import NO_LABEL
from .columns import Labels
from .labelling import Classes
from .reading import Found

MOST = 12  # classes, to list each


@dataclass(frozen=True)
class Part:
    """Rows of a split that have the same columns.

    Args:
        images: The encoded pictures alone.
        labels: Theirs.
        maps: The pictures that are labels, where these are wanted.
        columns: What the columns of images and of labels are called.
        reason: Why there are no labels.
    """

    images: Dataset
    labels: Labels
    maps: Dataset | None
    columns: tuple[str, str | None]
    reason: str


@dataclass(frozen=True)
class Shown:
    """One of the two splits.

    Args:
        name: As the data set calls it.
        parts: What it was made of.
        rows: The pictures with their labels.
    """

    name: str
    parts: Sequence[Part]
    rows: Dataset

    @cached_property
    def counts(self) -> Counter[int]:
        """How many images each class has."""
        labels = np.asarray(self.rows.with_format("numpy")["label"][:])
        return Counter(labels[labels != NO_LABEL].tolist())


def summarised(place: str, found: Found, splits: Sequence[Shown], classes: Classes) -> str:
    """Splits, columns, classes and counts, files found and used, and what may not be what is wanted."""
    lines = [f"Data: {place}, {found.source}"]
    lines += [f"  {split.name}: {_split(split, classes)}" for split in splits]
    if any(split.counts for split in splits):
        lines.append(f"  {'Labels' if classes.by_pixel else 'Classes'}: {classes.how}")
    if found.files is not None:
        lines.append("  Files: {} found, {} used".format(*found.files))
    names = [split.name for split in splits]
    left = [f"{name} ({sum(map(len, parts)):,} images)" for name, parts in found.splits.items() if name not in names]
    if left:
        lines.append(f"  Not used: split {', '.join(left)}")
    return "\n".join([*lines, *(f"  WARNING: {warning}" for warning in [*found.warnings, *_warnings(splits)])])


def _split(split: Shown, classes: Classes) -> str:
    labelled, total = sum(split.counts.values()), len(split.rows)
    pictures = f"{total:,} images" + "".join(f" in column {name!r}" for name in _columns(split, 0))
    if not labelled:
        reasons = sorted({part.reason for part in split.parts if part.reason})
        return f"{pictures}, no labels" + "".join(f" ({reason})" for reason in reasons)
    counted = f"{labelled:,} with a label" + "".join(f" in column {name!r}" for name in _columns(split, 1))
    if classes.by_pixel:
        return f"{pictures}, {counted}"
    return f"{pictures}, {counted}: {_counts(split.counts, classes)}"


def _columns(split: Shown, which: int) -> list[str]:
    return sorted({str(part.columns[which]) for part in split.parts if part.columns[which] is not None})


def _counts(counts: Counter[int], classes: Classes) -> str:
    if len(counts) > MOST:
        return f"{len(counts):,} classes of {min(counts.values()):,} to {max(counts.values()):,} images"
    return ", ".join(f"{classes.names.get(number, number)} {counts[number]:,}" for number in sorted(counts))


def _warnings(splits: Sequence[Shown]) -> list[str]:
    some = [split.name for split in splits if split.counts]
    without = [split.name for split in splits if not split.counts]
    found = [f"{without[0]!r} has no labels, and {some[0]!r} has"] if some and without else []
    missing = {split.name: len(split.rows) - sum(split.counts.values()) for split in splits if split.counts}
    lacking = [f"{count:,} of {name!r}" for name, count in missing.items() if count]
    if lacking:
        found.append(f"images without a label, which count beside the teacher alone: {', '.join(lacking)}")
    return found
