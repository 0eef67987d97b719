"""Reading a data set: one of the Hub, a folder of images or of tables, or what ``save_to_disk`` wrote."""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import datasets
import pyarrow.parquet
from datasets import ClassLabel, Dataset, DatasetDict

from .classes import in_order
from .layouts import TABLES, Files, class_level, files_in, splits_of_images, splits_of_tables

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"}

OTHER_PICTURES = "_file_name"


@dataclass(frozen=True)
class Found:
    """The splits of a data set.

    Args:
        source: What it was read as.
        splits: The rows of each, in parts that may have other columns.
        folder: What paths in the rows are relative to.
        files: How many files of its kind lie there, and how many of these the splits use; None where ``datasets`` found
            them.
        warnings: What may not be what is wanted.
        unlabelled: Why there is no column of labels, where there is none and no warning says why.
    """

    source: str
    splits: dict[str, list[Dataset]]
    folder: Path | None = None
    files: tuple[int, int] | None = None
    warnings: list[str] = field(default_factory=list)
    unlabelled: str | None = None


def read(name: str, config_name: str | None = None) -> Found:
    """Read a data set.

    Args:
        name: An id of the Hub, a folder, or a file of a table.
        config_name: The configuration of a data set that has several.

    Raises:
        ValueError: It cannot be read, or it is not clear what its files are.
    """
    place = Path(name)
    if place.is_file() and place.suffix.lower() in TABLES:
        return Found("a file", {"train": _tables([place])}, place.parent, (1, 1))
    saved = (place / "dataset_dict.json").is_file() or (place / "state.json").is_file()
    if place.is_dir() and not saved and config_name is None and not _has_configurations(place):
        files = files_in(place)
        if files.images and files.metadata:
            return _from_metadata(place, files)
        if files.images:
            return _from_images(place, files)
        if files.tables:
            return _from_tables(place, files)
    try:
        loaded = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, config_name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{name} cannot be read as a data set: {error.__cause__ or error}") from error
    splits = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
    return Found("as datasets finds it", {split: [rows] for split, rows in splits.items()}, place)


def _has_configurations(folder: Path) -> bool:
    """Whether a card names the files of the splits."""
    card = folder / "README.md"
    if not card.is_file():
        return False
    header = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    return bool(header and re.search(r"^configs:", header[1], re.MULTILINE))


def _from_images(folder: Path, files: Files) -> Found:
    """A folder of images, whose folders may be splits and classes."""
    roots = splits_of_images(files.images)
    below = {
        split: [path.relative_to(root) for path in files.images if path.is_relative_to(root)]
        for split, root in roots.items()
    }
    level, reason = class_level(below)
    warnings = [f"no labels: {reason}"] if reason else []
    classes = {split: [_class_of(path, level) for path in paths] for split, paths in below.items()}
    names = in_order(name for found in classes.values() for name in found if name is not None)
    numbers = {name: number for number, name in enumerate(names)}
    splits = {}
    for split, root in roots.items():
        columns: dict[str, list[Any]] = {"image": [str(folder / root / path) for path in below[split]]}
        if not all(name is None for name in classes[split]):
            columns["label"] = [numbers[str(name)] for name in classes[split]]
        rows = Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))
        splits[split] = [rows.cast_column("label", ClassLabel(names=names)) if "label" in columns else rows]
    used = sum(map(len, below.values()))
    warnings += _unused([*files.tables, *files.others], "no images")
    unlabelled = "" if reason else "no folders of classes"
    return Found("a folder of images", splits, folder, (len(files.images), used), warnings, unlabelled)


def _class_of(path: PurePath, level: int | None) -> str | None:
    return None if level is None or len(path.parts) == 1 else path.parts[level]


def _from_metadata(folder: Path, files: Files) -> Found:
    """A folder of images with tables that name them by a column ``file_name``.

    Raises:
        ValueError: A table has no such column, or names images that are not there.
    """
    roots = splits_of_images(files.images)
    splits: dict[str, list[Dataset]] = {}
    there, named = set(files.images), set[PurePath]()
    for table in files.metadata:
        (rows,) = _tables([folder / table])
        if "file_name" not in rows.column_names or "image" in rows.column_names:
            raise ValueError(f"{folder / table} must have a column file_name, and none called image")
        paths = [table.parent / name for name in rows["file_name"]]
        named.update(paths)
        if missing := [str(path) for path in paths if path not in there]:
            raise ValueError(f"{folder / table} names {len(missing)} images that are not there, such as {missing[0]}")
        rows = rows.remove_columns("file_name").add_column("image", list(map(str, paths)))
        rows, others = _with_other_pictures(rows, table.parent)
        named.update(others)
        for split, root in roots.items():
            inside = [index for index, path in enumerate(paths) if path.is_relative_to(root)]
            if inside:
                splits.setdefault(split, []).append(rows.select(inside))
    warnings = _unused([path for path in files.images if path not in named], "not named in the metadata")
    warnings += _unused([*files.tables, *files.others], "no images")
    return Found("a folder of images with metadata", splits, folder, (len(files.images), len(named)), warnings)


def _with_other_pictures(rows: Dataset, folder: PurePath) -> tuple[Dataset, list[PurePath]]:
    """Rows whose columns ``…_file_name`` name other pictures of each, such as its mask: called ``…``, with paths."""
    every: list[PurePath] = []
    for column in [name for name in rows.column_names if name.endswith(OTHER_PICTURES)]:
        paths = [None if name is None else folder / name for name in rows[column][:]]
        every += [path for path in paths if path is not None]
        given = [None if path is None else str(path) for path in paths]
        rows = rows.remove_columns(column).add_column(column.removesuffix(OTHER_PICTURES), given)
    return rows, every


def _from_tables(folder: Path, files: Files) -> Found:
    kind = next(suffix for suffix in TABLES if any(path.suffix.lower() == suffix for path in files.tables))
    chosen = [path for path in files.tables if path.suffix.lower() == kind]
    splits = {split: _tables([folder / path for path in paths]) for split, paths in splits_of_tables(chosen).items()}
    left = [path for path in [*files.tables, *files.metadata, *files.others] if path not in chosen]
    warnings = _unused([path for path in left if path.suffix.lower() not in (".md", ".txt")], f"not of kind {kind}")
    return Found(f"a folder of {kind} files", splits, folder, (len(chosen), len(chosen)), warnings)


def _unused(paths: Sequence[PurePath], why: str) -> list[str]:
    if not paths:
        return []
    kinds = Counter(path.suffix.lower() or "without a suffix" for path in paths).most_common(5)
    shown = ", ".join(f"{count} {suffix}" for suffix, count in kinds)
    return [f"{len(paths)} files are not used, as they are {why}: {shown}; the first is {paths[0]}"]


def _tables(files: Iterable[Path]) -> list[Dataset]:
    """The rows of some tables; those with the same columns together, as ``datasets`` reads no others together."""
    groups: dict[str, list[Path]] = {}
    parts = []
    try:
        for file in files:
            parquet = file.suffix.lower() == ".parquet"
            groups.setdefault(_columns_of(file) if parquet else str(file), []).append(file)
        for group in groups.values():
            suffix = group[0].suffix.lower()
            given: dict[str, Any] = {"sep": "\t"} if suffix == ".tsv" else {}
            paths = [glob.escape(str(file)) for file in group]
            parts.append(datasets.load_dataset(BUILDERS[suffix], data_files=paths, split="train", **given))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{file.parent} holds a table that cannot be read: {error.__cause__ or error}") from error
    return parts


def _columns_of(file: Path) -> str:
    return str(datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(file)))
