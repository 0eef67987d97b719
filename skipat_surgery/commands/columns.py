"""The columns of pictures and of labels in a data set, whatever they are called and stored as."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Value

from ..tasks.labels import NO_LABEL
from .classes import in_order
from .decoding import decode

LABEL_NAMES = ("label", "labels", "target", "targets", "class", "cls", "category")
MAP_NAMES = (
    *("mask", "masks", "segmentation_mask", "segmentation", "annotation", "annotations"),
    *("depth", "depth_map", "label", "labels", "target"),
)
TEXT, BYTES = ("string", "large_string"), ("binary", "large_binary")
NUMBERS = ("int", "uint", "bool", "float", "null")
MISSING = "all are missing"
TRIED = 100  # rows, to see what a column of text or bytes holds


@dataclass(frozen=True)
class Labels:
    """The labels of some rows.

    Args:
        values: Classes (n,), counted from 0 in the order of `names`; NO_LABEL where there is none.
        names: Of the classes; None where they are numbers.
    """

    values: np.ndarray
    names: list[str] | None


def find_images(data: Dataset, column: str | None, folder: Path | None, place: str) -> str:
    """The column of pictures: the one that was named, or the only one that there is beside labels.

    Args:
        data: The rows.
        column: Its name; None where it is to be found.
        folder: What paths in the rows are relative to.
        place: What the rows are called in messages.

    Raises:
        ValueError: There is none, or several, or the one that was named holds no pictures.
    """
    if column is not None and column not in data.features:
        raise ValueError(f"{place} has no column {column!r}; its columns are {data.column_names}")
    found: list[str] = []
    for holds in (_holds_images, _holds_bytes, _holds_paths):
        found = found or [c for c in ([column] if column else data.column_names) if holds(data, c, folder)]
    if len(found) > 1:
        found = [c for c in found if c.lower() not in MAP_NAMES] or found
    if len(found) == 1:
        return found[0]
    if column is not None:
        images = [c for c in data.column_names if _holds_images(data, c, folder)]
        raise ValueError(
            f"column {column!r} of {place} holds {data.features[column]}, not images, their bytes, or paths of files "
            f"that are there; images are in {images}"
        )
    several = f"several columns of images, {found}; name one with"
    what = several if found else "no column of images; if one is, name it with"
    raise ValueError(f"{place} has {what} --image_column. Its columns are {data.column_names}")


def encoded(data: Dataset, column: str, folder: Path | None, place: str) -> Dataset:
    """The pictures of a column alone, still encoded, as the column ``image``.

    Raises:
        ValueError: The column names files that are not there.
    """
    data = data.select_columns([column])
    if isinstance(data.features[column], Value) and data.features[column].dtype in TEXT:
        data = Dataset.from_dict({column: _paths(data, column, folder, place)})
    # Decoded later, so that one corrupt picture is not the end.
    return data.cast_column(column, datasets.Image(decode=False)).rename_columns({column: "image"})


def find_labels(data: Dataset, column: str | None, place: str) -> tuple[str | None, str]:
    """The column of labels, and the reason where it gives none.

    Args:
        data: The rows.
        column: Its name; None where it is to be found by its type or its name, ``"none"`` where none is wanted.
        place: What the rows are called in messages.

    Raises:
        ValueError: There are several.
    """
    if column == "none":
        return None, "none wanted"
    if column is not None:
        return (column, MISSING) if column in data.features else (None, f"no column {column!r}")
    named = [c for c in LABEL_NAMES if c in data.features]
    found = [c for c, feature in data.features.items() if isinstance(feature, ClassLabel)]
    found = found or [c for c in named if isinstance(data.features[c], Value)]
    if len(found) > 1:
        raise ValueError(f"{place} has several columns of labels, {found}; name one with --label_column")
    if found:
        return found[0], MISSING
    if named:
        return None, f"column {named[0]!r} holds {data.features[named[0]]}, not one class for each image"
    return None, f"no column is called {', '.join(LABEL_NAMES[:-1])} or {LABEL_NAMES[-1]}"


def find_maps(
    data: Dataset, column: str | None, image_column: str | None, folder: Path | None, place: str
) -> tuple[str | None, str]:
    """The column of pictures that are labels, and the reason where it gives none.

    Args:
        data: The rows.
        column: Its name; None where it is to be found by its name and its type, ``"none"`` where none is wanted.
        image_column: The column of the images themselves, where it was named.
        folder: What paths in the rows are relative to.
        place: What the rows are called in messages.

    Raises:
        ValueError: There are several, or the one that was named holds no pictures.
    """
    if column == "none":
        return None, "none wanted"
    if column is not None and column not in data.features:
        return None, f"no column {column!r}"
    named = [c for c in data.column_names if c.lower() in MAP_NAMES and c != image_column]
    tests = (_holds_images, _holds_bytes, _holds_paths)
    found = [c for c in ([column] if column else named) if any(holds(data, c, folder) for holds in tests)]
    if column is not None and not found:
        raise ValueError(
            f"column {column!r} of {place} holds {data.features[column]}, not pictures with a label for each pixel: "
            "name another by --label_column, or none"
        )
    if len(found) > 1:
        raise ValueError(f"{place} has several columns of labels, {found}; name one with --label_column")
    if found:
        return found[0], MISSING
    return None, f"no column of pictures is called {', '.join(MAP_NAMES[:-1])} or {MAP_NAMES[-1]}"


def labels_in(data: Dataset, column: str, place: str) -> Labels:
    """The labels in a column of classes, text, integers, booleans, or whole floats.

    Raises:
        ValueError: It holds something else.
    """
    feature = data.features[column]
    values = data.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()
    if isinstance(feature, Value) and feature.dtype in TEXT:
        names = in_order(filter(None, values))
        number = {name: index for index, name in enumerate(names)}
        return Labels(_whole([number.get(value) for value in values]), names)
    if isinstance(feature, ClassLabel):
        return Labels(_whole(values), list(feature.names))
    if isinstance(feature, Value) and feature.dtype.startswith(NUMBERS):
        if not any(isinstance(value, float) and value % 1 > 0 for value in values):
            return Labels(_whole(values), None)
    raise ValueError(
        f"column {column!r} of {place} holds {feature}, not one class for each image: name another by --label_column, "
        "or none"
    )


def _holds_images(data: Dataset, column: str, folder: Path | None) -> bool:
    feature = data.features[column]
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _holds_bytes(data: Dataset, column: str, folder: Path | None) -> bool:
    return any(decode({"bytes": value, "path": None}, "RGB") for value in _first(data, column, BYTES))


def _holds_paths(data: Dataset, column: str, folder: Path | None) -> bool:
    return any(_place_of(value, folder) is not None for value in _first(data, column, TEXT))


def _first(data: Dataset, column: str, dtypes: tuple[str, ...]) -> Iterator[Any]:
    """The first values of a column; none where its type is another."""
    feature = data.features[column]
    if isinstance(feature, Value) and feature.dtype in dtypes:
        for row in data.select_columns([column]).select(range(min(TRIED, len(data)))):
            if row[column] is not None:
                yield row[column]


def _place_of(path: str, folder: Path | None) -> str | None:
    """Where a file lies, in the data set's folder or from the working directory; None where it does not."""
    tried = (path,) if folder is None else (os.path.join(folder, path), path)
    return next((each for each in tried if os.path.isfile(each)), None)


def _paths(data: Dataset, column: str, folder: Path | None, place: str) -> list[str | None]:
    named = data[column][:]
    found = [None if path is None else _place_of(path, folder) for path in named]
    missing = [path for path, there in zip(named, found, strict=True) if path is not None and there is None]
    if missing:
        count = f"{len(missing)} of its {len(named)} files"
        raise ValueError(f"column {column!r} of {place}: {count} are not there, such as {', '.join(missing[:3])}")
    return found


def _whole(values: list[Any]) -> np.ndarray:
    """Numbers as classes, None and NaN as NO_LABEL."""
    numbers = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    return np.where(np.isnan(numbers), NO_LABEL, numbers).astype(np.int64)
