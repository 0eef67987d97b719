"""The images that a command is given: two splits, their columns and classes, and all of that in words."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image, concatenate_datasets

from ..tasks.labels import NO_LABEL
from .columns import Labels, encoded, find_images, find_labels, find_maps, labels_in
from .labelling import Classes, in_classes
from .layouts import CANONICAL
from .maps import Maps
from .objects import OBJECTS, ObjectLists, as_objects, find_objects
from .reading import Found, read
from .streaming import ImageStream
from .summary import Part, Shown, summarised

EVAL_SPLITS = ("validation", "valid", "val", "test")
IMAGE, LABEL, MAP = "image", "label", "map"
CHECKED = 20  # maps, before the work begins


@dataclass(frozen=True)
class ImageData:
    """A training and an evaluation split, with the columns to read.

    Args:
        train: The rows to distil on.
        evaluation: The rows to measure on.
        image_column: The column of encoded pictures.
        label_column: The column of classes, NO_LABEL where an image has none, or of encoded maps, None where an image
            has none; None where no image has any.
        train_labels: How many of the rows to distil on have a label.
        summary: Splits, columns, classes and counts, files found and used, and what may not be what is wanted.
        maps: How the labels are read, where they are maps.
        stream: All rows to distil on, as they come; the rows above are then the first of them.
    """

    train: Dataset
    evaluation: Dataset
    image_column: str
    label_column: str | None
    train_labels: int
    summary: str
    maps: Maps | None = None
    stream: ImageStream | None = None


def load_image_data(
    name: str | DatasetDict | Found,
    config_name: str | None = None,
    train_split: str | None = None,
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    maps: Maps | None = None,
) -> ImageData:
    """Load a data set of images, find its splits and columns, and bring its labels to a model's classes.

    Args:
        name: Anything ``datasets.load_dataset`` takes: a Hub id, a folder of images, a folder or a file of tables; or
            a folder that ``save_to_disk`` wrote; or splits that are loaded already, or were read.
        config_name: The configuration of a data set that has several.
        train_split: The split to distil on; ``train``, or the only one, when left out.
        eval_split: The split to evaluate on; when left out, ``validation`` or ``test``, or else every tenth image of
            the training split, which is then not trained on.
        image_column: The column of images, of their bytes, or of their paths; found when left out.
        label_column: The column of labels; found when left out. ``"none"`` reads none.
        num_classes: How many classes the model has; None leaves the labels in the data set's own order.
        class_names: The model's, in its order; None where they have no names.
        maps: How labels are read that are pictures, a class or a depth for each pixel; None where they are classes.

    Raises:
        ValueError: A split or column is missing or ambiguous, there are too few images, or the classes are not the
            model's.
    """
    if isinstance(name, DatasetDict):
        found, place = Found("given", {str(split): [rows] for split, rows in name.items()}), "the data set"
    elif isinstance(name, Found):
        found, place = name, "the data set"
    else:
        found, place = read(name, config_name), name
    train_split, eval_split = chosen_splits(train_split, eval_split, found.splits, place)
    names = dict.fromkeys((train_split, eval_split))
    parts = {split: _parts(found, split, image_column, label_column, place, maps) for split in names}
    every = [part for split in names for part in parts[split]]
    classes = _classes(every, num_classes, class_names, place, maps)
    rows = [_row_of(part).add_column(LABEL, each) for part, each in zip(every, classes.numbers, strict=True)]
    count = len(parts[train_split])
    train = concatenate_datasets(rows[:count])
    if eval_split == train_split:
        train, evaluation = _divided(train, place)
        shown = [Shown(train_split, parts[train_split], train), Shown("every tenth of these", [], evaluation)]
    else:
        evaluation = concatenate_datasets(rows[count:])
        shown = [Shown(train_split, parts[train_split], train), Shown(eval_split, parts[eval_split], evaluation)]
    train_labels, eval_labels = (sum(split.counts.values()) for split in shown)
    summary = summarised(place, found, shown, classes)
    if maps is not None:
        _check_maps(evaluation, maps, place)
    label = (LABEL if maps is None else MAP) if train_labels or eval_labels else None
    return ImageData(train, evaluation, IMAGE, label, train_labels, summary, maps)


def chosen_splits(
    train_split: str | None, eval_split: str | None, splits: Collection[str], place: str
) -> tuple[str, str]:
    """The split to train on, and the one to measure on, which is the same where there is no other.

    Raises:
        ValueError: There is no such split, or it is not clear which.
    """
    train = _split(train_split, splits, place) or ("train" if "train" in splits else _only(splits, place))
    return train, _split(eval_split, splits, place) or next((s for s in EVAL_SPLITS if s in splits), train)


def _parts(
    found: Found,
    split: str,
    image_column: str | None,
    label_column: str | None,
    place: str,
    maps: Maps | None,
) -> list[Part]:
    """The rows of a split, in parts with the same columns.

    Raises:
        ValueError: It holds no images, or a column is missing or ambiguous.
    """
    place, rows = f"split {split!r} of {place}", [part for part in found.splits[split] if len(part)]
    if not rows:
        raise ValueError(f"{place} holds no images")
    if label_column not in (None, "none") and not any(label_column in part.column_names for part in rows):
        raise ValueError(f"{place} has no column {label_column!r}; its columns are {rows[0].column_names}")
    parts = []
    for part in rows:
        if maps is None:
            label, reason = find_labels(part, label_column, place)
        elif isinstance(maps, ObjectLists):
            label, reason = find_objects(part, label_column, place)
        else:
            label, reason = find_maps(part, label_column, image_column, found.folder, place)
        others = part if maps is None or label is None else part.remove_columns([label])
        image = find_images(others, image_column, found.folder, place)
        if label is label_column is None and found.unlabelled is not None:
            reason = found.unlabelled
        nothing = Labels(np.full(len(part), NO_LABEL), None)
        pictures = None if maps is None else _encoded_maps(part, label, maps, found.folder, place)
        labels = nothing if label is None else labels_in(part, label, place) if pictures is None else _there(pictures)
        parts.append(Part(encoded(part, image, found.folder, place), labels, pictures, (image, label), reason))
    return parts


def _encoded_maps(rows: Dataset, column: str | None, maps: Maps, folder: Path | None, place: str) -> Dataset:
    """The pictures that are labels, still encoded, or the lists of objects; None for each row where there are none."""
    if isinstance(maps, ObjectLists):
        return as_objects(rows, column, maps, place).rename_column(OBJECTS, MAP)
    if column is None:
        return Dataset.from_dict({MAP: [None] * len(rows)}, features=Features({MAP: Image(decode=False)}))
    return encoded(rows, column, folder, place).rename_column(IMAGE, MAP)


def _there(maps: Dataset) -> Labels:
    """Who of some rows has a map, by 0."""
    missing = maps.with_format("arrow")[:].column(MAP).is_null().to_numpy()
    return Labels(np.where(missing, NO_LABEL, 0), None)


def _row_of(part: Part) -> Dataset:
    return part.images if part.maps is None else concatenate_datasets([part.images, part.maps], axis=1)


def _classes(
    parts: Sequence[Part], num_classes: int | None, names: Sequence[str] | None, place: str, maps: Maps | None
) -> Classes:
    labels = [part.labels for part in parts]
    if maps is None:
        return in_classes(labels, num_classes, names, place)
    return Classes([part.values for part in labels], {}, maps.how, by_pixel=True)


def _check_maps(rows: Dataset, maps: Maps, place: str) -> None:
    """Check the first maps, before the work begins.

    Raises:
        ValueError: One holds what the model does not give, or is no picture of one number for each pixel.
    """
    for row in rows.select_columns([MAP]).select(range(min(CHECKED, len(rows)))):
        found = row[MAP] if isinstance(maps, ObjectLists) else maps(row[MAP])
        if found is not None:
            maps.check(found, place)


def _divided(rows: Dataset, place: str) -> tuple[Dataset, Dataset]:
    """Every tenth image apart.

    Raises:
        ValueError: There is but one.
    """
    if len(rows) < 2:
        raise ValueError(f"{place} has one image, and one split: give at least two images, or two splits")
    halves = rows.train_test_split(test_size=0.1, shuffle=True, seed=0)
    return halves["train"], halves["test"]


def _split(given: str | None, splits: Collection[str], place: str) -> str | None:
    """The name of a split that was asked for, also by another of its usual names."""
    if given is None or given in splits:
        return given
    if CANONICAL.get(given) in splits:
        return CANONICAL[given]
    raise ValueError(f"{place} has no split {given!r}; it has {sorted(splits)}")


def _only(splits: Collection[str], place: str) -> str:
    if len(splits) != 1:
        raise ValueError(f"{place} has no split 'train' but {sorted(splits)}; name one with --train_split")
    return next(iter(splits))
