"""Items of an image data set for distillation: decoded, augmented, and put together in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
from datasets import Dataset
from torch import Tensor
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as TF

from ..batches import Images
from ..tasks.labels import NO_LABEL
from .decoding import decode
from .maps import Maps

Preprocess = Callable[[list[PIL.Image.Image]], Any]


class ImageItems(torch.utils.data.Dataset):
    """Items of one split: (image or None, label). Corrupt images are None, and are counted where they are used.

    A label is a class, NO_LABEL where there is none, or what `maps` makes of it: a map, objects, or None.

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
        maps: Maps | None = None,
    ) -> None:
        self.maps = maps
        self.data, self.image_column, self.label_column = data, image_column, label_column
        self.mode, self.augment, self.seed = mode, augment, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[PIL.Image.Image | None, Any]:
        position, index = key if isinstance(key, tuple) else (0, key)
        return self.item(position, self.data[int(index)])

    def item(self, position: int, row: dict[str, Any]) -> tuple[PIL.Image.Image | None, Any]:
        """What becomes of a row at a position in the run."""
        image = decode(row[self.image_column], self.mode)
        if image is not None and self.augment is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed + position)
                image = self.augment(image)
        label = row[self.label_column] if self.label_column else None
        if self.maps is not None:
            return image, self.maps(label, image)
        return image, NO_LABEL if label is None else label


class Collate:
    """Batches of `ImageItems`: pixel_values, labels, and `valid`, which is False for corrupt images (zeros, or the
    patches of a black picture).

    Labels that are maps stay a list, as each may have its own size.
    """

    def __init__(self, preprocess: Preprocess, mode: str, size: tuple[int, int]) -> None:
        self.preprocess, self.mode, self.size = preprocess, mode, size

    def __call__(self, items: list[tuple[PIL.Image.Image | None, Any]]) -> dict[str, Any]:
        blank = PIL.Image.new(self.mode, self.size[::-1])
        pixels = self.preprocess([blank if image is None else image for image, _ in items])
        valid = torch.tensor([image is not None for image, _ in items])
        labels = [label for _, label in items]
        classes = all(isinstance(label, int) for label in labels)
        return {
            "pixel_values": pixels * valid[:, None, None, None] if isinstance(pixels, Tensor) else pixels,
            "labels": torch.tensor(labels) if classes else labels,
            "valid": valid,
        }


class ReadableBatches(torch.utils.data.IterableDataset[Images]):
    """Batches of pixels (B, C, H, W), or of patches, in order, without labels.

    The next image takes the place of a corrupt one.

    Args:
        items: The images.
        order: Which of them.
        batch_size: Images a batch; only the last batch may be smaller.
        preprocess: Images as the model wants them.
    """

    def __init__(self, items: ImageItems, order: Sequence[int], batch_size: int, preprocess: Preprocess) -> None:
        self.items, self.order, self.batch_size, self.preprocess = items, order, batch_size, preprocess

    def __len__(self) -> int:
        """The number of batches where no image is corrupt."""
        return -(-len(self.order) // self.batch_size)

    def __iter__(self) -> Iterator[Images]:
        readable: list[PIL.Image.Image] = []
        for index in self.order:
            image, _ = self.items[index]
            readable += [] if image is None else [image]
            if len(readable) == self.batch_size:
                yield self.preprocess(readable)
                readable = []
        if readable:
            yield self.preprocess(readable)


def training_crop(size: tuple[int, int], min_scale: float) -> v2.Transform:
    """A random crop of at least this share of the image, resized to (height, width), and flipped half of the time."""
    crop = v2.RandomResizedCrop(size, scale=(min_scale, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
    return v2.Compose([crop, v2.RandomHorizontalFlip()])


@dataclass(frozen=True)
class PartOfImage:
    """A random crop of at least this share of the image, at the image's own size, flipped half of the time."""

    min_scale: float

    def __call__(self, image: PIL.Image.Image) -> PIL.Image.Image:
        box = RandomResizedCrop.get_params(image, [self.min_scale, 1.0], [3 / 4, 4 / 3])
        return v2.RandomHorizontalFlip()(TF.crop(image, *box))
