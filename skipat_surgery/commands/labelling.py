"""The labels of a data set's parts, brought to one order of classes, and that to the model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..tasks.labels import NO_LABEL
from .classes import WITHOUT_LABELS, in_order, matched
from .columns import Labels


@dataclass(frozen=True)
class Classes:
    """The classes of a data set.

    Args:
        numbers: The class of each image (n,), part by part; NO_LABEL where there is none.
        names: By number, of those that the data set names; none where it has numbers alone.
        how: In words, how they were brought to the model's.
        by_pixel: Whether the labels are pictures; the numbers then say only who has one, by 0.
    """

    numbers: list[np.ndarray]
    names: dict[int, str]
    how: str
    by_pixel: bool = False


def in_classes(
    labels: Sequence[Labels], num_classes: int | None, class_names: Sequence[str] | None, place: str
) -> Classes:
    """Bring the labels of some parts to the classes of a model, or to one order where no model is given.

    Args:
        labels: Of each part.
        num_classes: The model's; None where it has none.
        class_names: The model's, in its order; None where they have no names.
        place: The data set.

    Raises:
        ValueError: The classes are not the model's, or a label is outside them.
    """
    named = [part.names for part in labels if part.names]
    if not named:
        values = [part.values for part in labels]
        _check_range(values, num_classes, place)
        return Classes(values, {}, "numbers without names, taken as the model's")
    names = _one_order(named)
    numbers, how = (list(range(len(names))), "in the data set's order")
    if num_classes is not None:
        numbers, how = matched(names, class_names, num_classes, place)
    if any(part != names for part in named):
        how += "; the parts of the data set have them in different orders, and were brought to one by the names"
    own = dict(zip(names, numbers, strict=True))
    found = []
    for part in labels:
        table = np.array([own[name] for name in part.names or names])
        _check_range([part.values], len(table), place)
        found.append(np.where(part.values == NO_LABEL, NO_LABEL, table[part.values]))
    return Classes(found, {number: name for name, number in own.items()}, how)


def _one_order(named: Sequence[list[str]]) -> list[str]:
    """The names of all parts in the order of one that has all of them, else sorted."""
    every = {name for names in named for name in names}
    return next((names for names in named if set(names) == every), None) or in_order(every)


def _check_range(values: Sequence[np.ndarray], count: int | None, place: str) -> None:
    used = np.concatenate([part[part != NO_LABEL] for part in values])
    if len(used) and (used.min() < 0 or (count is not None and used.max() >= count)):
        allowed = "are numbered from 0" if count is None else f"run from 0 to {count - 1}"
        raise ValueError(
            f"the labels of {place} run from {used.min()} to {used.max()}, and the classes {allowed}: number them so, "
            f"with {NO_LABEL} where there is no label. {WITHOUT_LABELS}"
        )
