"""The real models that quality is measured on, with the images to convert them on and others to measure on.

Both lie beside the repository, in ``../shared``, and are not part of it.
"""

from __future__ import annotations

import copy
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
from skipat_surgery.commands.machine import usual_dtype
from skipat_surgery.measure.timing import Estimate, latencies
from skipat_surgery.observing import evaluating
from skipat_surgery.precision import multiplies_bf16

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

    def __init__(self, count: int, folder: Path = SHARED, device: str = "cpu") -> None:
        self.host = loading.load(str(folder / "models" / "cifar10-vit-tiny"))
        self.teacher, self.data = self.host.model.to(device), folder / "data" / "cifar10"
        self.device = device
        rows = rows_of(self.data / "test.parquet").select(range(count))
        self.test, self.labels = self._pixels(rows, count), torch.tensor(rows["label"], device=device)
        self.expected = self._logits(self.teacher)

    def _pixels(self, rows: Any, count: int) -> Tensor:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count].sort().values
        pictures = [picture.convert("RGB") for picture in rows.select(order.tolist())["image"]]
        return self.host.preprocess(pictures).to(self.device)

    def fitting(self, count: int) -> list[Tensor]:
        """Training images."""
        return list(self._pixels(rows_of(self.data / "train.parquet"), count).split(64))

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
        with bf16(self.device):
            return torch.cat([model(batch).logits.float() for batch in self.test.split(250)])


class Saliency:
    """A DINOv2-S with a decoder that gives a map of what stands out, on photos of COCO with masks of their objects."""

    quality = "patch_cosine"

    def __init__(self, count: int, side: int = 224, folder: Path = SHARED, device: str = "cpu") -> None:
        sys.path.insert(0, str(folder / "models"))
        import saliency

        whole = saliency.load(folder / "models" / "dinov2-small-saliency").to(device)
        self.teacher, self.decoder, self.side, self.device = whole.backbone, whole.decoder, side, device
        self.photos = [folder / "data" / "photos" / f"{name}.parquet" for name in ("imagenet_samples", "photos")]
        rows = rows_of(folder / "data" / "discovery" / "coco_mini.parquet").select(range(count))
        self.test = self._pixels(rows["image"])
        self.masks = torch.stack([self._square(mask, nearest=True)[0] > 0 for mask in rows["mask"]]).to(device)
        self.tokens, self.maps = self._outputs(self.teacher)

    def _square(self, picture: Any, nearest: bool = False) -> Tensor:
        mode = v2.InterpolationMode.NEAREST if nearest else v2.InterpolationMode.BICUBIC
        return TF.center_crop(TF.resize(TF.pil_to_tensor(picture), [self.side], mode, antialias=True), [self.side])

    def _pixels(self, pictures: Iterable[Image.Image]) -> Tensor:
        pixels = torch.stack([self._square(picture.convert("RGB")) for picture in pictures])
        return TF.normalize(pixels / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]).to(self.device)

    def fitting(self, count: int) -> list[Tensor]:
        """Photos, those of ImageNet first."""
        photos = concatenate_datasets([rows_of(file).select_columns("image") for file in self.photos])
        return list(self._pixels(photos.select(range(count))["image"]).split(16))

    def images(self, count: int) -> Tensor:
        """Photos to measure on."""
        return self.test[:count]

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Cosine of the patch tokens with the teacher's, correlation and MAE of the maps, their IoU with any object."""
        tokens, maps = self._outputs(model)
        return {
            "patch_cosine": F.cosine_similarity(tokens[:, 1:], self.tokens[:, 1:], dim=-1).mean().item(),
            "map_correlation": F.cosine_similarity(_centred(maps), _centred(self.maps), dim=1).mean().item(),
            "map_mae": (maps.sigmoid() - self.maps.sigmoid()).abs().mean().item(),
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
        with bf16(self.device):
            for batch in self.test.split(8):
                tokens.append(model(batch).last_hidden_state.float())
                maps.append(self.decoder(tokens[-1][:, 1:].mT.unflatten(2, grid)).float())
        return torch.cat(tokens), torch.cat(maps)


def rows_of(file: Path) -> Any:
    """The rows of a parquet file."""
    return load_dataset("parquet", data_files=str(file), split="train")


def bf16(device: str = "cpu") -> Any:
    """Autocast in bfloat16, where the device has it; a CPU that has not is a hundred times faster in float32."""
    return torch.autocast(device, torch.bfloat16, enabled=multiplies_bf16(torch.device(device)))


def dtype_named(name: str | None, device: str = "cpu") -> torch.dtype:
    """bf16 or fp32; None is bf16 where the device has it.

    Raises:
        ValueError: There is no such name.
    """
    dtypes, name = {"bf16": torch.bfloat16, "fp32": torch.float32}, name or usual_dtype(torch.device(device))
    if name not in dtypes:
        raise ValueError(f"--dtype must be one of {sorted(dtypes)}, got {name!r}")
    return dtypes[name]


def speeds_of(
    models: dict[str, nn.Module], images: Tensor, rounds: int, max_seconds: float, untouched: str
) -> dict[str, Estimate]:
    """How many times as fast as the untouched model each of them is, in the precision of the images, all by turns."""
    models = {name: copy.deepcopy(model).to(images.dtype) for name, model in models.items()}
    with evaluating(*models.values()):
        calls = {name: lambda model=model: model(images) for name, model in models.items()}
        seconds = latencies(calls, images.device, rounds, max_seconds, progress=True)
    return {name: Estimate.of_speed(seconds[untouched], own) for name, own in seconds.items()}


def _share(right: Tensor) -> float:
    return right.float().mean().item()


def _centred(maps: Tensor) -> Tensor:
    return maps.flatten(1) - maps.flatten(1).mean(dim=1, keepdim=True)
