"""The real models that quality is measured on, with the images to convert them on and others to measure on.

Both lie beside the repository, in ``../shared``, and are not part of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import concatenate_datasets, load_dataset
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from skipat_surgery.commands import loading

SHARED = Path(__file__).parents[2] / "shared"


class Subject(Protocol):
    """A teacher, and what is measured of a model made from it.

    Attributes:
        teacher: The untouched model.
        quality: Name of the figure that stands for all of them in a picture.
    """

    teacher: nn.Module
    quality: str

    def fitting(self, count: int) -> list[Tensor]:
        """Batches of unlabelled images to solve and distil on."""

    def images(self, count: int) -> Tensor:
        """A batch to time."""

    def measure(self, model: nn.Module) -> dict[str, float]:
        """What the model keeps, on images that `fitting` never gives."""


class Classifier:
    """The CIFAR-10 teacher, a ViT of 12 blocks and 65 tokens, on test images."""

    quality = "agreement"

    def __init__(self, count: int, folder: Path = SHARED) -> None:
        self.host = loading.load(str(folder / "models" / "cifar10-vit-tiny"))
        self.teacher, self.data = self.host.model, folder / "data" / "cifar10"
        rows = _rows(self.data / "test.parquet").select(range(count))
        self.test, self.labels = self._pixels(rows, count), torch.tensor(rows["label"])
        self.expected = self._logits(self.teacher)

    def _pixels(self, rows: Any, count: int) -> Tensor:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count].sort().values
        return self.host.preprocess([picture.convert("RGB") for picture in rows.select(order.tolist())["image"]])

    def fitting(self, count: int) -> list[Tensor]:
        """Training images."""
        return list(self._pixels(_rows(self.data / "train.parquet"), count).split(64))

    def images(self, count: int) -> Tensor:
        """Test images."""
        return self.test[:count]

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Top-1, agreement with the teacher, and KL."""
        logits = self._logits(model)
        p, q = self.expected.log_softmax(-1), logits.log_softmax(-1)
        return {
            "top1": _share(logits.argmax(-1) == self.labels),
            "agreement": _share(logits.argmax(-1) == self.expected.argmax(-1)),
            "kl": F.kl_div(q, p, log_target=True, reduction="batchmean").item(),
        }

    @torch.no_grad()
    def _logits(self, model: nn.Module) -> Tensor:
        with _bf16():
            return torch.cat([model(batch).logits.float() for batch in self.test.split(250)])


class Saliency:
    """A DINOv2-S with a decoder that gives a map of what stands out, on photos of COCO with masks of their objects."""

    quality = "patch_cosine"

    def __init__(self, count: int, side: int = 224, folder: Path = SHARED) -> None:
        sys.path.insert(0, str(folder / "models"))
        import saliency

        whole = saliency.load(folder / "models" / "dinov2-small-saliency")
        self.teacher, self.decoder, self.side = whole.backbone, whole.decoder, side
        self.photos = [folder / "data" / "photos" / f"{name}.parquet" for name in ("imagenet_samples", "photos")]
        rows = _rows(folder / "data" / "discovery" / "coco_mini.parquet").select(range(count))
        self.test = self._pixels(rows["image"])
        self.masks = torch.stack([self._square(mask, nearest=True)[0] > 0 for mask in rows["mask"]])
        self.tokens, self.maps = self._outputs(self.teacher)

    def _square(self, picture: Any, nearest: bool = False) -> Tensor:
        mode = v2.InterpolationMode.NEAREST if nearest else v2.InterpolationMode.BICUBIC
        return TF.center_crop(TF.resize(TF.pil_to_tensor(picture), [self.side], mode, antialias=True), [self.side])

    def _pixels(self, pictures: Iterable[Image.Image]) -> Tensor:
        pixels = torch.stack([self._square(picture.convert("RGB")) for picture in pictures])
        return TF.normalize(pixels / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

    def fitting(self, count: int) -> list[Tensor]:
        """Photos, those of ImageNet first."""
        photos = concatenate_datasets([_rows(file).select_columns("image") for file in self.photos])
        return list(self._pixels(photos.select(range(count))["image"]).split(16))

    def images(self, count: int) -> Tensor:
        """Photos to measure on."""
        return self.test[:count]

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Cosine of the patch tokens with the teacher's, correlation of the maps, IoU of a map with any object."""
        tokens, maps = self._outputs(model)
        return {
            "patch_cosine": F.cosine_similarity(tokens[:, 1:], self.tokens[:, 1:], dim=-1).mean().item(),
            "map_correlation": F.cosine_similarity(_centred(maps), _centred(self.maps), dim=1).mean().item(),
            "iou": self._iou(maps),
            "teacher_iou": self._iou(self.maps),
        }

    def _iou(self, maps: Tensor) -> float:
        found = F.interpolate(maps, size=self.masks.shape[-2:], mode="bilinear")[:, 0] > 0
        both, either = (found & self.masks).sum((1, 2)), (found | self.masks).sum((1, 2))
        return (both / either.clamp(min=1)).mean().item()

    @torch.no_grad()
    def _outputs(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        grid = (self.side // 14,) * 2
        tokens, maps = [], []
        with _bf16():
            for batch in self.test.split(8):
                tokens.append(model(batch).last_hidden_state.float())
                maps.append(self.decoder(tokens[-1][:, 1:].mT.unflatten(2, grid)).float())
        return torch.cat(tokens), torch.cat(maps)


def _rows(file: Path) -> Any:
    return load_dataset("parquet", data_files=str(file), split="train")


def _bf16() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def _share(right: Tensor) -> float:
    return right.float().mean().item()


def _centred(maps: Tensor) -> Tensor:
    return maps.flatten(1) - maps.flatten(1).mean(dim=1, keepdim=True)
