"""Semantic segmentation of street scenes (CamVid): a linear head on the real DINOv2-S of `subjects`.

The head is trained here, on the frozen tokens of the untouched model, and is the same for every model that is measured.
Images are resized to a whole number of patches, 364×476; maps are compared with the masks at their own 360×480.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from subjects import SHARED, bf16, rows_of
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF
from tqdm.auto import tqdm

from skipat_surgery.tasks.segmentation import mean_iou, overlaps

SIDES, PATCH = (364, 476), 14
CLASSES, UNLABELLED = 11, 11
EPOCHS, RATE = 30, 2e-3


class StreetScenes:
    """The backbone, and what a linear head on its tokens makes of the validation scenes.

    Args:
        count: Validation images to measure on.
        every: The head is trained on every so many training images, as scenes are frames of a few drives.
        folder: Where models and data lie.
    """

    quality = "miou"

    def __init__(self, count: int, every: int = 3, folder: Path = SHARED) -> None:
        sys.path.insert(0, str(folder / "models"))
        import saliency

        self.teacher = saliency.load(folder / "models" / "dinov2-small-saliency").backbone
        data = folder / "data" / "segmentation"
        self.train, validation = rows_of(data / "train.parquet"), rows_of(data / "val.parquet").select(range(count))
        self.test, self.masks = _pixels(validation["image"]), _masks(validation["mask"])
        scenes = self.train.select(range(0, len(self.train), every))
        self.head = _trained_head(self._tokens(self.teacher, _pixels(scenes["image"])), _masks(scenes["mask"]))
        self.tokens = self._tokens(self.teacher, self.test)
        self.classes = self._classes(self.tokens)

    def fitting(self, count: int) -> list[Tensor]:
        """Training scenes, evenly spaced."""
        chosen = np.linspace(0, len(self.train) - 1, count).astype(int).tolist()
        return list(_pixels(self.train.select(chosen)["image"]).split(8))

    def images(self, count: int) -> Tensor:
        """Validation scenes."""
        return self.test[:count]

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Mean IoU with the masks and with the teacher's classes, pixels of the same class, cosine of the tokens."""
        tokens = self._tokens(model, self.test)
        classes = self._classes(tokens)
        return {
            "miou": self._miou(classes),
            "teacher_miou": self._miou(self.classes),
            "agreement": (classes == self.classes).float().mean().item(),
            "patch_cosine": F.cosine_similarity(tokens, self.tokens, dim=-1).mean().item(),
        }

    def _miou(self, classes: Tensor) -> float:
        both, either = overlaps(classes, self.masks, CLASSES + 1, ignored=UNLABELLED)
        return mean_iou(both.sum(dim=0), either.sum(dim=0))

    @torch.no_grad()
    def _tokens(self, model: nn.Module, images: Tensor) -> Tensor:
        with bf16():
            batches = tqdm(images.split(4), desc="Scenes", unit="batch")
            return torch.cat([model(batch).last_hidden_state[:, 1:].float() for batch in batches])

    @torch.no_grad()
    def _classes(self, tokens: Tensor) -> Tensor:
        return torch.cat([_logits(self.head, part, self.masks.shape[-2:]).argmax(dim=1) for part in tokens.split(8)])


def _trained_head(tokens: Tensor, masks: Tensor) -> nn.Module:
    """A linear classifier of tokens (n, N, D) by masks (n, H, W)."""
    torch.manual_seed(0)
    head = nn.Linear(tokens.shape[-1], CLASSES)
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=1e-3)
    steps = EPOCHS * -(-len(tokens) // 8)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    small = masks[:, 2::4, 2::4]  # a sixteenth of the pixels teaches a linear head as much
    for _ in tqdm(range(EPOCHS), desc="Training the head", unit="epoch"):
        for chosen in torch.randperm(len(tokens)).split(8):
            logits = _logits(head, tokens[chosen], small.shape[-2:])
            optimizer.zero_grad()
            F.cross_entropy(logits, small[chosen], ignore_index=UNLABELLED).backward()
            optimizer.step()
            schedule.step()
    return head.eval()


def _logits(head: nn.Module, tokens: Tensor, size: Iterable[int]) -> Tensor:
    maps = head(tokens).mT.unflatten(2, tuple(side // PATCH for side in SIDES))
    return F.interpolate(maps, size=tuple(size), mode="bilinear")


def _pixels(pictures: Iterable) -> Tensor:
    sized = [TF.resize(TF.pil_to_tensor(picture.convert("RGB")), list(SIDES), antialias=True) for picture in pictures]
    return TF.normalize(torch.stack(sized) / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def _masks(masks: Iterable) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(mask)).long() for mask in masks])
