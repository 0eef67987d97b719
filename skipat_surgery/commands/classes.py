"""The classes of a model and those of a data set: brought together by their names, or refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import timm

from ..tasks.contrastive import ZeroShot
from ..tasks.finding import num_classes_of, task_of

SHOWN = 10
WITHOUT_LABELS = "Pass --label_column none to distil without labels: agreement and KL are then reported"


def names_of(model: Any) -> list[str] | None:
    """A classifier's names of its classes, in their order; None where it has none that mean anything."""
    task = task_of(model)
    if isinstance(task, ZeroShot):
        return names_in(task.texts)
    count = num_classes_of(model)
    if count is None:
        return None
    if hasattr(model, "config"):
        return names_in_config(model.config)
    found = list(getattr(model, "pretrained_cfg", {}).get("label_names") or [])
    return found if len(found) == count and any(found) else None


def names_in_config(config: Any) -> list[str] | None:
    """The names of the classes in a configuration of transformers; None where they mean nothing."""
    found = [str(config.id2label.get(number, "")) for number in range(config.num_labels)]
    return None if all(re.fullmatch(r"LABEL_\d+|", name) for name in found) else found


def count_of(model: Any) -> int | None:
    """How many classes labels of images may be of; None where these tell nothing of the model."""
    task = task_of(model)
    return len(task.texts) if isinstance(task, ZeroShot) else num_classes_of(model)


def in_order(names: Iterable[str]) -> list[str]:
    """Names of classes, each once, sorted: by number where all are numbers."""
    distinct = set(names)
    numbers = all(re.fullmatch(r"\d{1,18}", name) for name in distinct)
    return sorted(distinct, key=lambda name: (int(name), name) if numbers else (0, name))


def matched(names: Sequence[str], model: Sequence[str] | None, count: int, place: str) -> tuple[list[int], str]:
    """The model's class for each of a data set's.

    Args:
        names: The data set's classes, in its order.
        model: The model's, in its order; None where they have no names.
        count: How many the model has.
        place: The data set.

    Returns:
        The model's class for each, and in words how they were found.

    Raises:
        ValueError: They are not the same classes; with those that differ, and what to do.
    """
    same_count, own = len(names) == count, list(range(len(names)))
    if model is not None and list(names) == list(model):
        return own, "the model's, in its order"
    if found := _by_name(names, model or []):
        if not same_count:
            return found, f"{len(names)} of the model's {count}, found by their names"
        return found, f"the model's, in {'its' if found == own else 'another'} order, found by their names"
    if same_count and list(names) == [str(number) for number in own]:
        return own, "numbers without names, taken as the model's"
    if synsets := _synsets(names, model, count):
        return synsets, "ImageNet's synsets, found in the model by ILSVRC's order"
    if model is None and same_count:
        return own, "taken in this order, as the model's have no names"
    raise ValueError(_differing(names, model, count, place))


def check_same_classes(model: Any, teacher: Any) -> None:
    """Check that two models have the same classes in the same order, as far as these have names.

    Raises:
        ValueError: They have not.
    """
    counts = num_classes_of(teacher), num_classes_of(model)
    if counts[0] != counts[1]:
        raise ValueError(f"the teacher has {counts[0]} classes, the model {counts[1]}")
    theirs, mine = names_of(teacher), names_of(model)
    pairs = zip(theirs or (), mine or (), strict=False)
    differing = [f"{one!r} and {other!r}" for one, other in pairs if _plain(one) != _plain(other)]
    if differing:
        raise ValueError(
            f"the teacher's classes are not the model's, or in another order: {_listed(differing)}; the model "
            "would learn of one class what is said of another"
        )


def _by_name(names: Sequence[str], model: Sequence[str]) -> list[int] | None:
    """Where each name stands in the model, whatever its case and separators; None where one does not, or twice."""
    for spelt in (str, _plain):
        mine, theirs = list(map(spelt, names)), list(map(spelt, model))
        if len(set(mine)) == len(mine) and all(theirs.count(name) == 1 for name in mine):
            return [theirs.index(name) for name in mine]
    return None


def _plain(name: str) -> str:
    return " ".join(re.split(r"[\s_-]+", name.casefold())).strip()


def _synsets(names: Sequence[str], model: Sequence[str] | None, count: int) -> list[int] | None:
    """ILSVRC's numbers of synsets such as n01440764; None where the names or the model's classes are others."""
    info = timm.data.ImageNetInfo()
    known = {synset: number for number, synset in enumerate(info.label_names())}
    if count != len(known) or not names or not all(name in known for name in names):
        return None
    if model is not None:  # their words, of which a few were corrected over the years
        words = [info.index_to_description(number).split(",")[0] for number in range(count)]
        alike = sum(_plain(one.split(",")[0]) == _plain(other) for one, other in zip(model, words, strict=True))
        if alike < 0.9 * count:
            return None
    return [known[name] for name in names]


def _differing(names: Sequence[str], model: Sequence[str] | None, count: int, place: str) -> str:
    if model is None:
        which = f"the data set's are {_listed(names)}, and the model's have no names"
    else:
        mine, theirs = set(map(_plain, names)), set(map(_plain, model))
        only_data = [name for name in names if _plain(name) not in theirs]
        only_model = [name for name in model if _plain(name) not in mine]
        which = f"the data set's are {_listed(names)}, the model's {_listed(model)}"
        which += f"; only the data set has {_listed(only_data)}, only the model {_listed(only_model)}"
    return (
        f"the model has {count} classes and {place} has {len(names)}, which are not the same, so top-1 would mean "
        f"nothing; nothing was done: {which}. {WITHOUT_LABELS}"
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "none") + more


def names_in(texts: Sequence[str]) -> list[str]:
    """What of each text names its class: without the words that all of them begin and end with.

    Examples:
        >>> names_in(["a photo of a tabby cat outdoors", "a photo of a dog outdoors"])
        ['tabby cat', 'dog']
    """
    words = [text.split() for text in texts]
    first = _shared(words)
    rest = [each[first:] for each in words]
    last = _shared([each[::-1] for each in rest])
    return [" ".join(each[: len(each) - last]) or " ".join(whole) for each, whole in zip(rest, words, strict=True)]


def _shared(words: Sequence[Sequence[str]]) -> int:
    """How many words all begin with."""
    count = 0
    while all(len(each) > count for each in words) and len({each[count] for each in words}) == 1:
        count += 1
    return count
