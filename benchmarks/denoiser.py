"""Two transformers that take noise out of photos, trained here.

A plain ViT: patch tokens in, pixels out. Its patches know where they lie from each other alone (rotary positions of
whole patches), so that it takes photos of any size: it is trained on crops of 16×16 and 32×32 patches. And a small
Swin2SR, a token for each pixel, which attends within windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from subjects import SHARED, rows_of
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF
from training import train
from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution

WHOLE = 16  # sides of photos are of whole patches, and of whole windows
LEVELS = (5, 55)  # σ in training, of pixels from 0 to 255


@dataclass(frozen=True)
class Shape:
    """Of a plain denoiser, and of its training: (side, crops a step, steps) one after the other."""

    width: int = 128
    depth: int = 8
    heads: int = 4
    stages: tuple[tuple[int, int, int], ...] = ((64, 16, 1000), (128, 8, 100))

    def build(self) -> Denoiser:
        """With fresh weights."""
        return Denoiser(self)


@dataclass(frozen=True)
class WindowedShape:
    """Of a denoiser that attends within windows, and of its training, as of a plain one."""

    width: int = 48
    depths: tuple[int, ...] = (6, 6)
    heads: int = 4
    window: int = 8
    stages: tuple[tuple[int, int, int], ...] = ((32, 8, 500),)

    def build(self) -> WindowedDenoiser:
        """With fresh weights."""
        return WindowedDenoiser(self)


class Denoiser(nn.Module):
    """Photos (B, 3, H, W) with noise, of values from 0 to 1 and sides of whole patches, to photos without."""

    patch = 4

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        # Not by `timm.create_model`, which drops None: with no shape to refer to, a position is a whole number.
        self.tower = Eva(
            img_size=64,
            patch_size=self.patch,
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.heads,
            mlp_ratio=4 * 2 / 3,
            swiglu_mlp=True,
            class_token=False,
            use_abs_pos_emb=False,
            use_rot_pos_emb=True,
            ref_feat_shape=None,
            dynamic_img_size=True,
            global_pool="",
            num_classes=0,
        )
        self.head = nn.Linear(shape.width, 3 * self.patch**2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """What is left without the noise."""
        tokens = self.head(self.tower.forward_features(4 * (images - 0.5)))
        grid = (images.shape[-2] // self.patch, images.shape[-1] // self.patch)
        return images - F.pixel_shuffle(tokens.mT.unflatten(2, grid), self.patch)


class WindowedDenoiser(nn.Module):
    """The same by transformers' Swin2SR, whose photos have sides of whole windows."""

    patch = 1

    def __init__(self, shape: WindowedShape) -> None:
        super().__init__()
        self.restorer = Swin2SRForImageSuperResolution(
            Swin2SRConfig(
                image_size=64,
                patch_size=self.patch,
                window_size=shape.window,
                embed_dim=shape.width,
                depths=list(shape.depths),
                num_heads=[shape.heads] * len(shape.depths),
                mlp_ratio=2.0,
                upscale=1,
                upsampler="",  # that of denoising
            )
        )
        # A mean is taken from the pixels on their way in and added to them on their way out, but what is added there
        # to the end of the network are pixels that never lost it.
        last = self.restorer.final_convolution
        nn.init.zeros_(last.weight)
        last.bias = nn.Parameter(-self.restorer.swin2sr.mean.flatten())

    def forward(self, images: Tensor) -> Tensor:
        """What is left without the noise."""
        return self.restorer(images).reconstruction


def with_noise(photos: Tensor, level: float, seed: int = 0) -> Tensor:
    """Photos (B, 3, H, W), and to each value what a normal distribution of σ = `level` / 255 draws."""
    noise = torch.randn(photos.shape, generator=torch.Generator().manual_seed(seed))
    return photos + level / 255 * noise


def pixels_of(pictures: Any) -> list[Tensor]:
    """(3, H, W) of each picture, from 0 to 1."""
    return [TF.pil_to_tensor(picture.convert("RGB")) / 255 for picture in pictures]


def training_photos(folder: Path = SHARED) -> list[Tensor]:
    """Photos of BSDS500, none of which is in CBSD68, (3, H, W) each."""
    rows = rows_of(folder / "data" / "photos" / "photos.parquet")
    chosen = [number for number, source in enumerate(rows["source"]) if "BSDS" in source.upper()]
    return pixels_of(rows.select(chosen)["image"])


def crops(photos: list[Tensor], side: int, count: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random crops, mirrored half of the time, and the same with noise of random levels: (count, 3, side, side)."""
    clean = []
    for number in torch.randint(len(photos), (count,), generator=draws).tolist():
        photo = photos[number]
        top, left = (int(torch.randint(size - side + 1, (), generator=draws)) for size in photo.shape[1:])
        crop = photo[:, top : top + side, left : left + side]
        clean.append(crop.flip(-1) if torch.rand((), generator=draws) < 0.5 else crop)
    batch = torch.stack(clean)
    low, high = LEVELS
    levels = low + (high - low) * torch.rand(count, 1, 1, 1, generator=draws)
    return batch, batch + levels / 255 * torch.randn(batch.shape, generator=draws)


def trained(shape: Shape | WindowedShape, file: Path) -> Denoiser | WindowedDenoiser:
    """A denoiser with the weights of a file; trained, and the file written, where there is none."""
    torch.manual_seed(0)
    model = shape.build()
    sizes = [(side, count) for side, count, steps in shape.stages for _ in range(steps)]
    photos = cache(training_photos)  # none are read where nothing is left to train

    def loss_of(step: int) -> Tensor:
        clean, noisy = crops(photos(), *sizes[step], torch.Generator().manual_seed(step))
        return F.l1_loss(model(noisy), clean)

    train(model, file, len(sizes), loss_of, learning_rate=2e-3, muon_learning_rate=2e-3, name="denoiser")
    return model.eval()
