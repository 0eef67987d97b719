"""Labels that are lists of objects, a class and a box for each, read as a detector's task takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from torch import Tensor
from torchvision.ops import box_convert

from .annotated import as_boxes
from .annotations import BOX_FORMATS
from .classes import matched
from .columns import MISSING

OBJECTS = "objects"
COLUMN_NAMES = (OBJECTS, "annotations", "annotation", "labels", "label")
BOX_NAMES = ("bbox", "bboxes", "boxes", "box")
CLASS_NAMES = ("category", "categories", "category_id", "label", "labels", "class", "classes")
BOXES, CLASSES = "boxes", "classes"  # as they are kept
FEATURE = {BOXES: List(List(Value("float64"))), CLASSES: List(Value("int64"))}


@dataclass(frozen=True)
class ObjectLists:
    """Objects, as `as_objects` keeps them.

    Args:
        num_classes: The model's.
        class_names: The model's, in its order; None where they have no names.
        box_format: ``xywh`` for a corner and the size, as COCO has it, ``xyxy`` for two corners; in pixels.

    Raises:
        ValueError: There is no such format.
    """

    num_classes: int
    class_names: tuple[str, ...] | None = None
    box_format: str = "xywh"

    def __post_init__(self) -> None:
        if self.box_format not in BOX_FORMATS:
            raise ValueError(f"--box_format must be one of {BOX_FORMATS}, got {self.box_format!r}")

    @property
    def how(self) -> str:
        """How they are read, in words."""
        return f"objects, a class and a box for each, {self.box_format} in pixels"

    def __call__(self, record: Any, image: PIL.Image.Image | None = None) -> dict[str, Tensor] | None:
        """What transformers' detectors take, None where there is no list, or no image.

        ``class_labels`` (n,), and ``boxes`` (n, 4) of centre and size in shares of the image.
        """
        if record is None or image is None:
            return None
        boxes = box_convert(as_boxes(record[BOXES]), self.box_format, "cxcywh")
        return {
            "class_labels": torch.tensor(record[CLASSES], dtype=torch.long),
            "boxes": boxes / torch.tensor([image.width, image.height] * 2),
        }

    def check(self, record: Any, place: str) -> None:
        """Check that a list holds the model's classes, and boxes that begin before they end.

        Raises:
            ValueError: It does not.
        """
        wrong = [kind for kind in record[CLASSES] if not 0 <= kind < self.num_classes]
        if wrong:
            raise ValueError(
                f"the objects of {place} are of the class {wrong[0]}, and the model's run from 0 to "
                f"{self.num_classes - 1}: number them so, or pass --label_column none to distil without labels"
            )
        corners = box_convert(as_boxes(record[BOXES]), self.box_format, "xyxy")
        if len(corners) != len(record[CLASSES]) or bool((corners[:, 2:] < corners[:, :2]).any()):
            raise ValueError(
                f"the objects of {place} are {len(record[CLASSES])} with {len(corners)} boxes, or have boxes that end "
                f"before they begin, read as {self.box_format}: see --box_format"
            )


def as_objects(rows: Dataset, column: str | None, objects: ObjectLists, place: str) -> Dataset:
    """The objects of some rows as the column ``objects``: lists of boxes and of the model's classes, found by the names
    where the data set has names; None where there is no list.

    Raises:
        ValueError: The classes are not the model's.
    """
    records: list[Any] = [None] * len(rows)
    if column is not None:
        names = _names(rows.features[column])
        numbers = None if names is None else matched(names, objects.class_names, objects.num_classes, place)[0]
        given = rows.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()
        records = [None if record is None else _kept(record, numbers) for record in given]
    return Dataset.from_dict({OBJECTS: records}, features=Features({OBJECTS: FEATURE}))


def find_objects(data: Dataset, column: str | None, place: str) -> tuple[str | None, str]:
    """The column of objects, and the reason where it gives none.

    Args:
        data: The rows.
        column: Its name; None where it is to be found by its name and what it holds, ``"none"`` where none is wanted.
        place: What the rows are called in messages.

    Raises:
        ValueError: The one that was named holds no objects.
    """
    if column == "none":
        return None, "none wanted"
    if column is not None and column not in data.features:
        return None, f"no column {column!r}"
    tried = [column] if column else [name for name in COLUMN_NAMES if name in data.features]
    found = [name for name in tried if _fields(data.features[name]) is not None]
    if column is not None and not found:
        raise ValueError(
            f"column {column!r} of {place} holds {data.features[column]}, not objects with one of {BOX_NAMES} and "
            f"one of {CLASS_NAMES}: name another by --label_column, or none"
        )
    if found:
        return found[0], MISSING
    return None, f"no column of objects is called {', '.join(COLUMN_NAMES[:-1])} or {COLUMN_NAMES[-1]}"


def _fields(feature: Any) -> Mapping[str, Any] | None:
    """What each object is given by; None where a column does not hold objects."""
    feature = getattr(feature, "feature", feature)  # of a list
    if not isinstance(feature, Mapping):
        return None
    return feature if all(any(name in feature for name in names) for names in (BOX_NAMES, CLASS_NAMES)) else None


def _names(feature: Any) -> list[str] | None:
    """The data set's names of the classes of its objects; None where it has numbers alone."""
    kind = _first(_fields(feature) or {}, CLASS_NAMES)
    kind = getattr(kind, "feature", kind)
    return list(kind.names) if isinstance(kind, ClassLabel) else None


def _kept(record: Any, numbers: Sequence[int] | None) -> dict[str, Any]:
    """Boxes and classes of a mapping of lists, or of a list of mappings."""
    if isinstance(record, Mapping):
        boxes, kinds = _first(record, BOX_NAMES), _first(record, CLASS_NAMES)
    else:
        boxes, kinds = ([_first(each, names) for each in record] for names in (BOX_NAMES, CLASS_NAMES))
    return {BOXES: boxes, CLASSES: kinds if numbers is None else [numbers[kind] for kind in kinds]}


def _first(given: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next(given[name] for name in names if name in given)
