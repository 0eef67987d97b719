"""Pictures with the boxes and masks of their objects: VOC's XML, COCO's JSON, or a table with columns for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image
from datasets import Dataset
from torch import Tensor

from .annotated import Annotated, as_boxes, corners_of, png_mask
from .annotation_files import coco_file, read_coco, read_voc
from .columns import encoded, find_images
from .decoding import decode
from .reading import read

BOX_COLUMNS, MASK_COLUMNS = ("boxes", "bboxes", "bbox"), ("mask", "masks", "segmentation")
BOX_FORMATS = ("xyxy", "xywh")


@dataclass(frozen=True)
class Columns:
    """How annotations are read.

    Args:
        split: The part to read; found where there is but one.
        image_column: Column of pictures; found when left out.
        boxes_column: Column of boxes; found when left out.
        mask_column: Column of masks; found when left out.
        box_format: ``xyxy`` for corners, ``xywh`` for a corner and the size.
    """

    split: str | None = None
    image_column: str | None = None
    boxes_column: str | None = None
    mask_column: str | None = None
    box_format: str = "xyxy"


def read_annotations(place: str, columns: Columns = Columns()) -> Sequence[Annotated]:
    """Read pictures with boxes or masks.

    Args:
        place: A folder with VOC's XML files; a JSON file of COCO's, or a folder that holds one with boxes; or a table,
            as `reading.read` takes it.
        columns: How to read it. What VOC and COCO themselves say needs none of them, but for the split of VOC.

    Raises:
        ValueError: There is no box and no mask, or it is not clear which, or pictures are not there.
    """
    root = Path(place)
    if root.is_dir() and (files := sorted(root.rglob("*.xml"))):
        found = read_voc(root, files, columns.split)
    elif file := coco_file(root):
        if columns.split is not None:
            raise ValueError(f"{file} is one split: give the file of another as --dataset, in the place of --split")
        found = read_coco(file, root)
    else:
        found = _table(place, columns)
    if not any(each.boxes is None or len(each.boxes) for each in found):
        raise ValueError(
            f"{place} holds no boxes and no masks: give a folder of VOC's XML, COCO's JSON, or a table with a column "
            "of boxes or masks"
        )
    return found


def _table(place: str, columns: Columns) -> list[Annotated]:
    """The rows of a table."""
    found = read(place)
    names = list(found.splits)
    split = columns.split or (names[0] if len(names) == 1 else None)
    if split not in found.splits:
        raise ValueError(f"{place} has the splits {names}: name one with --split, got {columns.split!r}")
    return [each for rows in found.splits[split] for each in _rows(rows, columns, found.folder, place)]


def _rows(rows: Dataset, columns: Columns, folder: Path | None, place: str) -> list[Annotated]:
    boxes_column = _column(rows, columns.boxes_column, BOX_COLUMNS, place)
    mask_column = _column(rows, columns.mask_column, MASK_COLUMNS, place)
    others = rows.remove_columns([mask_column] if mask_column else [])
    pictures = encoded(others, find_images(others, columns.image_column, folder, place), folder, place)
    masks = encoded(rows, mask_column, folder, place) if mask_column else None
    given: list[Any] = [None] * len(rows) if boxes_column is None else rows[boxes_column][:]
    boxes = [None if each is None else _in_format(as_boxes(each), columns.box_format, place) for each in given]
    return [
        Annotated(partial(_picture_in, pictures, index), each, partial(_mask_in, masks, index))
        for index, each in enumerate(boxes)
        if each is not None or masks is not None
    ]


def _column(rows: Dataset, given: str | None, names: Sequence[str], place: str) -> str | None:
    if given is not None and given not in rows.column_names:
        raise ValueError(f"{place} has no column {given!r}; its columns are {rows.column_names}")
    return given or next((name for name in names if name in rows.column_names), None)


def _in_format(boxes: Tensor, box_format: str, place: str) -> Tensor:
    corners = corners_of(boxes) if box_format == "xywh" else boxes
    if (corners[:, 2:] < corners[:, :2]).any():
        other = next(each for each in BOX_FORMATS if each != box_format)
        raise ValueError(
            f"{place} holds boxes that end before they begin, read as {box_format}: try --box_format {other}"
        )
    return corners


def _picture_in(pictures: Dataset, index: int, mode: str) -> PIL.Image.Image | None:
    return decode(pictures[index]["image"], mode)


def _mask_in(masks: Dataset | None, index: int) -> Tensor | None:
    return None if masks is None else png_mask(masks[index]["image"])
