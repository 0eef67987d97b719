"""Image data sets for distillation: found, decoded and augmented."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Value
from torch import Tensor
from torchvision.transforms import v2

from ..convert.losses import NO_LABEL

EVAL_SPLITS = ("validation", "valid", "val", "test")


class DataError(ValueError):
    """The data set cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class ImageData:
    """A training and an evaluation split, with the columns to read.

    `label_column` is None where there are no labels, and `num_classes` where the labels do not say how many they are.
    """

    train: Dataset
    evaluation: Dataset
    image_column: str
    label_column: str | None
    num_classes: int | None


def load_image_data(
    name: str | DatasetDict,
    config_name: str | None = None,
    train_split: str | None = None,
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImageData:
    """Load a data set of images and find its splits and columns.

    Args:
        name: Anything ``datasets.load_dataset`` takes: a Hub id, a folder of images, a folder of parquet files; or a
            folder that ``save_to_disk`` wrote; or splits that are loaded already.
        config_name: The configuration of a data set that has several.
        train_split: The split to distil on; ``train``, or the only one, when left out.
        eval_split: The split to evaluate on; when left out, ``validation`` or ``test``, or else every tenth image of
            the training split, which is then not trained on.
        image_column: The column of images; found from the features when left out.
        label_column: The column of labels; found when left out. ``"none"`` reads none.

    Raises:
        DataError: A split or column is missing or ambiguous, or there are no images.
    """
    splits = name if isinstance(name, DatasetDict) else _load_splits(name, config_name)
    name = "the data set" if isinstance(name, DatasetDict) else name
    train_split = train_split or ("train" if "train" in splits else _only(splits, name))
    eval_split = eval_split or next((split for split in EVAL_SPLITS if split in splits), train_split)
    for split in (train_split, eval_split):
        if split not in splits:
            raise DataError(f"{name} has no split {split!r}; it has {sorted(splits)}")
    train, evaluation = splits[train_split], splits[eval_split]
    if eval_split == train_split:
        halves = train.train_test_split(test_size=0.1, shuffle=True, seed=0)
        train, evaluation = halves["train"], halves["test"]
    image_column = _find_image_column(train, image_column, name)
    found_label, num_classes = _find_label_column(train, label_column, name)
    for split, data in ((train_split, train), (eval_split, evaluation)):
        if len(data) == 0:
            raise DataError(f"split {split!r} of {name} holds no images")
    raw = datasets.Image(decode=False)  # decoded later, so that one corrupt image is not the end
    train, evaluation = (data.cast_column(image_column, raw) for data in (train, evaluation))
    return ImageData(train, evaluation, image_column, found_label, num_classes)


def _load_splits(name: str, config_name: str | None) -> DatasetDict:
    folder = Path(name)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        loaded = datasets.load_from_disk(name)
    else:
        try:
            loaded = datasets.load_dataset(name, config_name)
        except (FileNotFoundError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
            raise DataError(f"{name} cannot be read as a data set: {error}") from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)


def _only(splits: DatasetDict, name: str) -> str:
    if len(splits) != 1:
        raise DataError(f"{name} has no split 'train' but {sorted(splits)}; name one with --train_split")
    return next(iter(splits))


def _find_image_column(data: Dataset, column: str | None, name: str) -> str:
    images = [c for c, feature in data.features.items() if _holds_images(feature)]
    if column is None:
        if len(images) == 1:
            return images[0]
        what = (
            f"several columns of images, {images}; name one with"
            if images
            else "no column of images; if one is, name it with"
        )
        raise DataError(f"{name} has {what} --image_column. Its columns are {data.column_names}")
    if column not in data.features:
        raise DataError(f"{name} has no column {column!r}; its columns are {data.column_names}")
    if column not in images:
        raise DataError(
            f"column {column!r} of {name} holds {data.features[column]}, not images; images are in {images}"
        )
    return column


def _holds_images(feature: Any) -> bool:
    """Whether a column is an image, or the encoded bytes of one."""
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _find_label_column(data: Dataset, column: str | None, name: str) -> tuple[str | None, int | None]:
    if column == "none":
        return None, None
    classes = [c for c, feature in data.features.items() if isinstance(feature, ClassLabel)]
    if column is None:
        if len(classes) > 1:
            raise DataError(f"{name} has several columns of labels, {classes}; name one with --label_column")
        if classes:
            return classes[0], data.features[classes[0]].num_classes
        named = data.features.get("label")
        return ("label", None) if isinstance(named, Value) and named.dtype.startswith("int") else (None, None)
    if column not in data.features:
        raise DataError(f"{name} has no column {column!r}; its columns are {data.column_names}")
    feature = data.features[column]
    return column, feature.num_classes if isinstance(feature, ClassLabel) else None


def decode(record: dict[str, Any], mode: str) -> PIL.Image.Image | None:
    """An image from its encoded bytes or path, converted to a PIL mode; None where it is corrupt."""
    try:
        source = io.BytesIO(record["bytes"]) if record["bytes"] is not None else record["path"]
        with PIL.Image.open(source) as image:
            return image.convert(mode)
    except (OSError, SyntaxError, ValueError, TypeError, PIL.Image.DecompressionBombError):
        return None


class ImageItems(torch.utils.data.Dataset):
    """Items of one split: (image or None, label). Corrupt images are None, and are counted where they are used.

    A key is an index, or (position in the run, index) for training: the position seeds the augmentation, so that an
    item is the same whichever process or worker makes it, and whether or not the run was resumed before.
    """

    def __init__(
        self,
        data: Dataset,
        image_column: str,
        label_column: str | None,
        mode: str,
        augment: Callable[[PIL.Image.Image], PIL.Image.Image] | None = None,
        seed: int = 0,
    ) -> None:
        self.data, self.image_column, self.label_column = data, image_column, label_column
        self.mode, self.augment, self.seed = mode, augment, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[PIL.Image.Image | None, int]:
        position, index = key if isinstance(key, tuple) else (0, key)
        row = self.data[int(index)]
        image = decode(row[self.image_column], self.mode)
        if image is not None and self.augment is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed + position)
                image = self.augment(image)
        label = row[self.label_column] if self.label_column else NO_LABEL
        return image, NO_LABEL if label is None else label


class Collate:
    """Batches of `ImageItems`: pixel_values, labels, and `valid`, which is False for corrupt images (zeros)."""

    def __init__(self, preprocess: Callable[[list[PIL.Image.Image]], Tensor], mode: str, size: tuple[int, int]) -> None:
        self.preprocess, self.mode, self.size = preprocess, mode, size

    def __call__(self, items: list[tuple[PIL.Image.Image | None, int]]) -> dict[str, Tensor]:
        blank = PIL.Image.new(self.mode, self.size[::-1])
        pixels = self.preprocess([blank if image is None else image for image, _ in items])
        valid = torch.tensor([image is not None for image, _ in items])
        labels = torch.tensor([label for _, label in items])
        return {"pixel_values": pixels * valid[:, None, None, None], "labels": labels, "valid": valid}


class ValidOnly:
    """A `Collate` that leaves corrupt images out: ``pixel_values`` alone."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, items: list[tuple[PIL.Image.Image | None, int]]) -> dict[str, Tensor]:
        batch = self.collate(items)
        return {"pixel_values": batch["pixel_values"][batch["valid"]]}


def training_crop(size: tuple[int, int], min_scale: float) -> v2.Transform:
    """A random crop of at least this share of the image, resized to (height, width), and flipped half of the time."""
    crop = v2.RandomResizedCrop(size, scale=(min_scale, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
    return v2.Compose([crop, v2.RandomHorizontalFlip()])
