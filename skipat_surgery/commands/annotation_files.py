"""Annotations as VOC and COCO write them, beside files of pictures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import PIL.Image
import torch
from PIL import ImageDraw
from torch import Tensor

from ..analysis.discovery import BACKGROUND, VOID
from .annotated import Annotated, as_boxes, corners_of, png_mask
from .decoding import decode
from .layouts import files_in
from .run_state import read_json

MASK_FOLDER, OTHER_MASKS, VOC_BOX = "SegmentationClass", "SegmentationObject", "object/bndbox"


def read_voc(root: Path, files: Sequence[Path], split: str | None) -> list[Annotated]:
    """VOC's XML files, whose boxes count pixels from 1 and hold their last one.

    Args:
        root: The folder.
        files: The XML files in it.
        split: Which of them, by a list in ``ImageSets/Main``; all when left out.

    Raises:
        ValueError: A file is broken, there is no such list, or pictures are not there.
    """
    if split is not None:
        lists = sorted(root.rglob(f"ImageSets/Main/{split}.txt"))
        if len(lists) != 1:
            raise ValueError(f"{root} holds {len(lists)} lists ImageSets/Main/{split}.txt, and --split takes one")
        wanted = set(lists[0].read_text(encoding="utf-8").split())
        files = [file for file in files if file.stem in wanted]
    trees = [(file, _xml(file)) for file in files]
    trees = [(file, tree) for file, tree in trees if tree.tag == "annotation"]
    pictures = Pictures(root)
    paths = pictures.find([tree.findtext("filename") or f"{file.stem}.jpg" for file, tree in trees])
    found = []
    for (file, tree), path in zip(trees, paths, strict=True):
        boxes = [[_number(box, side) for side in ("xmin", "ymin", "xmax", "ymax")] for box in tree.iterfind(VOC_BOX)]
        if not np.isfinite(boxes).all():
            raise ValueError(f"{file} has an object whose box lacks a side")
        width, height = (_number(tree, f"size/{side}") for side in ("width", "height"))
        size = (width, height) if width > 0 and height > 0 else None
        corners = as_boxes(boxes) - torch.tensor([1, 1, 0, 0])
        mask = partial(png_mask, _record(pictures.masks.get(file.stem)))
        found.append(Annotated(partial(decode, _record(path)), corners, mask, size))
    return found


def _xml(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(file).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"{file} is no XML: {error}") from error


def _number(tree: ElementTree.Element, name: str) -> float:
    return float(tree.findtext(name) or "nan")


def coco_file(place: Path) -> Path | None:
    """The file of COCO's that a place is or holds, with boxes; None where there is none.

    Raises:
        ValueError: It holds several.
    """
    tried = [place] if place.is_file() else [place / path for path in files_in(place).tables] if place.is_dir() else []
    tried = [file for file in tried if file.suffix.lower() == ".json"]
    found = [file for file in tried if any("bbox" in each for each in _annotations(file))]
    if len(found) > 1:
        raise ValueError(f"{place} holds several files with boxes, {[str(f) for f in found]}: give one as --dataset")
    return found[0] if found else None


def _annotations(file: Path) -> list[dict[str, Any]]:
    try:
        held = read_json(file)
    except ValueError:  # a list of rows is a table
        return []
    return held["annotations"] if {"images", "annotations"} <= set(held) else []


def read_coco(file: Path, place: Path) -> list[Annotated]:
    """COCO's JSON, whose pictures lie beside it or, as in ``annotations/instances.json``, in the folder above.

    Raises:
        ValueError: Pictures are not there.
    """
    held, objects = read_json(file), defaultdict[int, list[dict[str, Any]]](list)
    for each in held["annotations"]:
        objects[each["image_id"]].append(each)
    images, pictures = held["images"], Pictures(place if place.is_dir() else file.parent)
    if place.is_file() and not pictures.named:
        pictures = Pictures(file.parent.parent)
    found = []
    for image, path in zip(images, pictures.find([image["file_name"] for image in images]), strict=True):
        size, own = (image["width"], image["height"]), objects[image["id"]]
        boxes = as_boxes([each["bbox"] for each in own if not each.get("iscrowd")])
        mask = partial(_coco_mask, own, size)
        found.append(Annotated(partial(decode, _record(path)), corners_of(boxes), mask, size))
    return found


def _coco_mask(objects: Sequence[dict[str, Any]], size: tuple[int, int]) -> Tensor | None:
    """The classes of pixels, from 1, drawn from polygons; crowds are void. None where one lacks these."""
    mask = PIL.Image.new("I", size, BACKGROUND)
    draw = ImageDraw.Draw(mask)
    for each in objects:
        shape = each.get("segmentation")
        if not shape or (isinstance(shape, dict) and not isinstance(shape["counts"], list)):
            return None
        if isinstance(shape, dict):
            runs, (height, width) = shape["counts"], shape["size"]
            inside = np.repeat(np.arange(len(runs)) % 2, runs).reshape(width, height).T.astype(bool)
            mask.paste(VOID if each.get("iscrowd") else each["category_id"] + 1, (0, 0), PIL.Image.fromarray(inside))
            continue
        for polygon in shape:
            draw.polygon(polygon, fill=each["category_id"] + 1)
    return torch.from_numpy(np.array(mask))


class Pictures:
    """The pictures in a folder, by their path there or their name."""

    def __init__(self, root: Path) -> None:
        self.root, self.named, self.masks = root, defaultdict[str, list[Path]](list), dict[str, Path]()
        for path in files_in(root).images:
            if path.parent.name == MASK_FOLDER:
                self.masks[path.stem] = root / path
            elif path.parent.name != OTHER_MASKS:
                self.named[path.name].append(root / path)

    def find(self, names: Iterable[str]) -> list[Path]:
        """The files of these names.

        Raises:
            ValueError: Some are not there, or are there twice.
        """
        places = [[self.root / n] if (self.root / n).is_file() else self.named[Path(n).name] for n in names]
        for wrong, what in ((0, "are not there"), (2, "are there more than once")):
            if bad := [n for n, found in zip(names, places, strict=True) if min(len(found), 2) == wrong]:
                raise ValueError(f"{len(bad)} of the pictures that {self.root} is to hold {what}, such as {bad[0]}")
        return [found[0] for found in places]


def _record(path: Path | None) -> Any:
    """A file as ``datasets.Image(decode=False)`` gives it."""
    return None if path is None else {"bytes": None, "path": str(path)}
