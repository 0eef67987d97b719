"""Kinds of `fuzz.py` that draw pictures, folders and tables as people have them, sound and damaged."""

from __future__ import annotations

import contextlib
import io
import random
import re
import tempfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image

from skipat_surgery.commands.data import ImageData, load_image_data
from skipat_surgery.commands.decoding import decode
from skipat_surgery.commands.images import ImageItems
from skipat_surgery.tasks.labels import NO_LABEL

MODES = ("1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F")
FORMATS = ("PNG", "TIFF", "BMP", "GIF", "WEBP", "JPEG", "PPM")
datasets.disable_progress_bars()
ORIENTATION = 0x0112
# EXIF's eight orientations, as what brings the stored pixels upright.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}
FOLDERS = ("train", "test", "val", "Training", "test tube", "a", "b", "10", "9", "n01", "images", ".hidden", "__MACOSX")
FILES = (
    "0.png",
    "1.png",
    "2.PNG",
    "x.jpg",
    "notes.txt",
    "labels.csv",
    ".DS_Store",
    "metadata.csv",
    "train.csv",
    "weiß.png",
)
LABELS: tuple[Any, ...] = (0, 1, 2, -1, None, "a", "b", "", 1.0, 1.5, True, 7, [0], 2**40)


def _encoded(image: PIL.Image.Image, kind: str, orientation: int = 1) -> bytes:
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = orientation
    file = io.BytesIO()
    image.save(file, kind, **({"exif": exif} if kind in ("PNG", "TIFF", "WEBP", "JPEG") else {}))
    return file.getvalue()


def _damaged(draw: random.Random, data: bytes) -> bytes:
    """Cut off, with bytes changed, or nothing of a picture at all."""
    way = draw.randrange(3)
    if way == 0:
        return data[: draw.randrange(len(data))]
    if way == 1:
        changed = bytearray(data)
        for _ in range(draw.randrange(1, 8)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        return bytes(changed)
    return draw.randbytes(draw.randrange(64))


def pictures(draw: random.Random) -> None:
    """A picture of any mode and format, sound or damaged: read upright and in its mode, or None, and nothing else."""
    width, height = draw.randrange(1, 24), draw.randrange(1, 24)
    pixels = np.random.default_rng(draw.randrange(2**32)).integers(0, 256, (height, width), dtype=np.uint8)
    kind, orientation, wanted = draw.choice(FORMATS), draw.randrange(1, 9), draw.choice(("RGB", "L"))
    given = draw.choice(MODES)
    image = PIL.Image.fromarray(pixels).convert(given)
    try:
        data = _encoded(image, kind, orientation)
    except (OSError, ValueError, KeyError):  # Pillow does not write this mode in this format
        data, given = _encoded(image.convert("L"), "PNG", orientation), "L"
        kind = "PNG"
    if draw.random() < 0.3:
        read = decode({"bytes": _damaged(draw, data), "path": None}, wanted)
        assert read is None or read.mode == wanted
        return
    read = decode({"bytes": data, "path": None}, wanted)
    assert read is not None
    assert read.mode == wanted
    turned = kind in ("PNG", "TIFF", "WEBP", "JPEG")
    expected = UPRIGHT[orientation](pixels) if turned else pixels
    assert read.size == expected.shape[::-1], (read.size, expected.shape)
    if given in ("L", "RGB") and kind in ("PNG", "TIFF", "BMP", "PPM"):
        assert np.array_equal(np.asarray(read.convert("L")), expected)


def _read_all(data: ImageData, num_classes: int | None) -> int:
    """Read every item of both splits as a run does; how many there are."""
    count = 0
    for rows in (data.train, data.evaluation):
        items = ImageItems(rows, data.image_column, data.label_column, "RGB")
        for index in range(len(items)):
            _, label = items[index]
            assert label == NO_LABEL or (label >= 0 and (num_classes is None or label < num_classes)), label
        count += len(items)
    assert data.summary
    return count


def _classes(draw: random.Random) -> tuple[int | None, list[str] | None]:
    """How many classes the model has, and their names."""
    count = draw.choice((None, 1, 2, 3))
    names = draw.sample(["a", "b", "9", "10", "n01"], count) if count and draw.random() < 0.5 else None
    return count, names


def folders(draw: random.Random) -> None:
    """Folders of pictures and other files, in any layout: what is used and what is not adds up to what is there."""
    with tempfile.TemporaryDirectory() as place:
        root, sound = Path(place) / "data", 0
        inside = draw.sample(FOLDERS, draw.randrange(1, 7))
        root.mkdir()
        for _ in range(draw.randrange(1, 24)):
            file = root.joinpath(
                *draw.choices(inside, k=draw.randrange(4)), draw.choices(FILES, (9, 9, 9, 9, 1, 1, 1, 1, 1, 9))[0]
            )
            if file.exists():
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            picture = _encoded(PIL.Image.new("RGB", (3, 3)), "JPEG" if file.suffix == ".jpg" else "PNG")
            if file.suffix.lower() in (".png", ".jpg"):
                hidden = any(part.startswith((".", "__")) for part in file.relative_to(root).parts)
                sound += not hidden
                file.write_bytes(picture if draw.random() < 0.8 else _damaged(draw, picture))
            else:
                file.write_text(draw.choice(("", "file_name,label\n0.png,a\n", "text\n", "file_name\n../0.png\n")))
        num_classes, names = _classes(draw)
        data = load_image_data(str(root), num_classes=num_classes, class_names=names)
        read = _read_all(data, num_classes)
        if "metadata" not in data.summary and "Files:" in data.summary:
            unused = sum(int(count) for count in re.findall(r"split \w+ \((\d+) images\)", data.summary))
            assert f"Files: {sound} found, {read + unused} used" in data.summary, data.summary


def tables(draw: random.Random) -> None:
    """Rows with a column of pictures or not, and labels of every type."""
    count = draw.randrange(1, 6)
    encoded = _encoded(PIL.Image.new("RGB", (3, 3)), "PNG")
    columns: dict[str, list[Any]] = {
        draw.choice(("image", "img", "picture")): [
            draw.choice((encoded, encoded, encoded, None, b"")) for _ in range(count)
        ]
    }
    pool = draw.sample(LABELS, draw.randrange(1, 4))
    columns[draw.choice(("label", "labels", "target", "other"))] = draw.choices(pool, k=count)
    if draw.random() < 0.2:
        columns["class"] = draw.choices((0, 1), k=count)
    splits = {}
    for split in draw.sample(("train", "test", "more"), draw.randrange(1, 4)):
        try:
            splits[split] = datasets.Dataset.from_dict(columns)
        except Exception:  # pyarrow knows no type for such a column, and nobody can have made it
            return
        with contextlib.suppress(Exception):
            if draw.random() < 0.5:
                splits[split] = splits[split].class_encode_column("label")
    num_classes, names = _classes(draw)
    data = load_image_data(datasets.DatasetDict(splits), num_classes=num_classes, class_names=names)
    _read_all(data, num_classes)
