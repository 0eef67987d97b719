"""Images that are read as they come: a data set of the Hub, or shards, of which no copy is made here.

Only its first images are kept: some to solve on, and those to measure on. What is trained on passes by.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm

from .columns import find_images
from .reading import BUILDERS, Found

BUFFER = 2048  # encoded images that are shuffled among each other
EVALUATED = 10  # where there is one split, the images whose checksum this divides are measured on
SHARDS = {**BUILDERS, ".tar": "webdataset"}


@dataclass(frozen=True)
class ImageStream:
    """The rows to train on, one after another.

    Args:
        rows: All of them, undecoded.
        column: Of the images.
        seed: Of the order.
    """

    rows: IterableDataset
    column: str
    seed: int

    def epoch(self, number: int) -> Iterator[dict[str, Any]]:
        """The rows of an epoch, in the order that it draws: of the shards, and within a buffer of the images."""
        for row in shuffled(self.rows, self.seed + number):
            yield {"image": _record(row[self.column])}


def shuffled(rows: IterableDataset, seed: int) -> Iterator[dict[str, Any]]:
    """The rows in an order that a seed draws, whole in every process and worker."""
    drawn = rows.shuffle(seed=seed, buffer_size=BUFFER)
    for batch in drawn.iter(batch_size=16):  # plain iteration would part the shards among a loader's workers
        yield from (dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True))


def open_stream(name: str, config_name: str | None) -> dict[str, IterableDataset]:
    """The splits of a data set, their images undecoded.

    Args:
        name: An id of the Hub, a folder of shards, or the name or pattern of shards: parquet files, or tar files as
            WebDataset writes them.
        config_name: The configuration of a data set that has several.

    Raises:
        ValueError: It cannot be read.
    """
    suffix = Path(name).suffix.lower()
    try:
        if suffix in SHARDS and not Path(name).is_dir():
            splits = datasets.load_dataset(SHARDS[suffix], data_files=name, streaming=True)
        else:
            splits = datasets.load_dataset(name, config_name, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"--dataset {name} cannot be streamed: {error}") from error
    return {str(split): rows.decode(False) for split, rows in splits.items()}


def parted(rows: IterableDataset, column: str) -> tuple[IterableDataset, IterableDataset]:
    """The rows to train on, and one in ten of them to measure on, by the checksum of the image: in whatever order they
    come, none is in both.
    """
    return rows.filter(partial(_measures, column, False)), rows.filter(partial(_measures, column, True))


def first_rows(rows: IterableDataset, count: int, seed: int | None, name: str) -> Dataset:
    """The first rows in the order of a seed; without one, as they lie, for which no buffer is filled.

    Raises:
        ValueError: There are none.
    """
    drawn = rows if seed is None else shuffled(rows, seed)
    with tqdm(islice(drawn, count), desc=f"Reading {name}", total=count, unit="image") as bar:
        found = list(bar)
    if not found:
        raise ValueError(f"{name} holds no images")
    return Dataset.from_list(found, features=rows.features)


def read_stream(
    name: str,
    splits: Mapping[str, IterableDataset],
    chosen: tuple[str, str],
    image_column: str | None,
    counts: tuple[int, int],
    seed: int,
) -> tuple[Found, ImageStream]:
    """What is kept of a stream, and the stream to train on.

    Args:
        name: Of the data set.
        splits: As `open_stream` gave them.
        chosen: The split to train on and the one to measure on, which may be the same.
        image_column: The column of images; found when left out.
        counts: How many images to keep of the first, and of the second at most.
        seed: Of the order.

    Raises:
        ValueError: A split holds no images, or a column is missing or ambiguous.
    """
    training, measuring = (splits[split] for split in chosen)
    places = [f"split {split!r} of {name}" for split in chosen]
    column = find_images(first_rows(training, 1, None, places[0]), image_column, None, places[0])
    if chosen[0] == chosen[1]:
        training, measuring = parted(training, column)
    kept = {
        "train": [first_rows(training, counts[0], seed, places[0])],
        "test": [first_rows(measuring, counts[1], seed, places[1])],
    }
    source = f"streamed: {chosen[0]!r} to train on, of which the first are kept, and the first of {chosen[1]!r}"
    return Found(source, kept), ImageStream(training.select_columns([column]), column, seed)


def _measures(column: str, wanted: bool, row: dict[str, Any]) -> bool:
    """Whether a row is, or is not, one of those to measure on."""
    record = _record(row[column]) or {"bytes": b"missing", "path": None}
    named = str(record["path"]).encode() if record["bytes"] is None else record["bytes"]
    return (zlib.crc32(named) % EVALUATED == 0) == wanted


def _record(value: Any) -> dict[str, Any] | None:
    """An encoded picture, as ``datasets.Image(decode=False)`` gives it, from that, its bytes, or its path."""
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    return {"bytes": None, "path": value} if isinstance(value, str) else value
