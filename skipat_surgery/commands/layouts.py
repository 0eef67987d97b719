"""Which files a folder holds, which splits they make, and which of its folders are classes. Nothing is opened.

The rules of ``datasets`` go by words anywhere in a path: a class called ``test tube`` would become the only split, and
what then belongs to none is left out without a word. Here a folder is a split by its whole name, and only where all
folders beside it are splits too.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import PIL.Image

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
CANONICAL = {word: split for split, words in SPLITS.items() for word in words}
TABLES = (
    ".parquet",
    ".arrow",
    ".jsonl",
    ".json",
    ".csv",
    ".tsv",
)  # the first kind that there is goes before the others
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
STUBS = {"BUFR", "GRIB", "HDF5", "MPEG"}  # which Pillow knows by name and cannot read


@dataclass(frozen=True)
class Files:
    """The files in a folder by what they are, relative to it and sorted."""

    images: list[PurePath] = field(default_factory=list)
    metadata: list[PurePath] = field(default_factory=list)
    tables: list[PurePath] = field(default_factory=list)
    others: list[PurePath] = field(default_factory=list)


def files_in(folder: Path) -> Files:
    """All files below a folder, through links too, without hidden ones."""
    found, visited = Files(), set()
    for place, folders, names in os.walk(folder, followlinks=True):
        visited.add(os.path.realpath(place))
        folders[:] = sorted(
            name for name in folders if _is_visible(name) and os.path.realpath(os.path.join(place, name)) not in visited
        )
        for name in filter(_is_visible, sorted(names)):
            path = PurePath(place, name).relative_to(folder)
            suffix = path.suffix.lower()
            if suffix in image_suffixes():
                found.images.append(path)
            elif suffix in TABLES:
                (found.metadata if name in METADATA else found.tables).append(path)
            else:
                found.others.append(path)
    return found


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of files that Pillow can read, with the plug-ins that are loaded."""
    known = PIL.Image.registered_extensions()
    return frozenset(suffix for suffix, kind in known.items() if kind in PIL.Image.OPEN and kind not in STUBS)


def split_of_folder(name: str) -> str | None:
    """The split that a folder such as ``train``, ``Val`` or ``test2017`` is by its whole name; None for another."""
    found = re.fullmatch(r"([a-z]+)[-_]?\d*", name.lower())
    return CANONICAL.get(found[1]) if found else None


def split_of_file(path: PurePath) -> str | None:
    """The one split whose word is in a table's path, as in ``train-00000-of-00002.parquet``; None for another."""
    words = re.findall(r"[a-z]+", path.stem.lower())
    named = {CANONICAL[word] for word in words if word in CANONICAL}
    named = named or {split for folder in path.parts[:-1] if (split := split_of_folder(folder))}
    return named.pop() if len(named) == 1 else None


def splits_of_images(images: Sequence[PurePath]) -> dict[str, PurePath]:
    """The folder of each split. One whole folder is the split ``train`` where its folders are no splits.

    Raises:
        ValueError: Some of its folders are splits and others are none, or two are the same split.
    """
    root = _without_lone_folders(images)
    below = [path.relative_to(root) for path in images]
    tops = {path.parts[0] for path in below}
    found = {
        path.parts[0]: split for path in below if len(path.parts) > 1 and (split := split_of_folder(path.parts[0]))
    }
    others = sorted(tops - set(found))
    if len(set(found.values())) < len(found):
        raise ValueError(f"folders {', '.join(found)} are the same split under two names: give each split one folder")
    if found and not others:
        return {split: root / name for name, split in found.items()}
    if len(found) > 1:
        raise ValueError(
            f"folders {', '.join(found)} are splits, and beside them lie images of none, such as {others[0]}: "
            "move these into a split or away"
        )
    return {"train": root}


def splits_of_tables(tables: Sequence[PurePath]) -> dict[str, list[PurePath]]:
    """The tables of each split, by their names; all are the split ``train`` where no name says one.

    Raises:
        ValueError: Some names say a split and others none.
    """
    splits: dict[str | None, list[PurePath]] = {}
    for table in tables:
        splits.setdefault(split_of_file(table), []).append(table)
    without = splits.pop(None, [])
    if without and splits:
        some = next(iter(splits.values()))[0]
        raise ValueError(
            f"{without[0]} names no split, and others beside it do, such as {some}: rename it, move it away, or give "
            "the one file as --dataset"
        )
    return {"train": without} if without else {str(split): files for split, files in splits.items()}


def class_level(splits: Mapping[str, Iterable[PurePath]]) -> tuple[int | None, str | None]:
    """Which folder on the way from a split to its images is their class, counted from 0.

    Args:
        splits: The images of each split, relative to its folder.

    Returns:
        The level, and where there are folders and none is the class, the reason. A split without folders has no labels.
    """
    ways = [
        path.parts[:-1] for paths in splits.values() if any(len(path.parts) > 1 for path in paths) for path in paths
    ]
    if not ways:
        return None, None
    shallow, deep = min(ways, key=len), max(ways, key=len)
    if len(shallow) != len(deep):
        where = " and ".join("/".join(way) or "the folder itself" for way in (shallow, deep))
        return None, f"images lie at different depths, such as in {where}: put all into folders of classes"
    levels = [level for level in range(len(deep)) if len({way[level] for way in ways}) > 1]
    if len(levels) > 1:
        return None, f"either level of folders may be the class, as in {'/'.join(deep)}: leave one level"
    return (levels[0] if levels else len(deep) - 1), None


def _is_visible(name: str) -> bool:
    return not name.startswith((".", "__"))


def _without_lone_folders(images: Sequence[PurePath]) -> PurePath:
    """The folder that the layout begins in: one with nothing beside it, and only folders inside, says nothing."""
    root, left = PurePath(), list(images)
    while left and len({path.parts[0] for path in left}) == 1 and all(len(path.parts) > 2 for path in left):
        name = left[0].parts[0]
        if split_of_folder(name):
            break
        root, left = root / name, [path.relative_to(name) for path in left]
    return root
