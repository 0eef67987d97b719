"""The embedded demonstration: scikit-learn's digits, and a small ViT trained on them for a minute as the teacher.

1,797 real images of 8×8 pixels, shipped with scikit-learn: nothing is downloaded.
"""

from __future__ import annotations

import datasets
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    get_cosine_schedule_with_warmup,
)

from ..convert.optimizers import optimizers
from ..tasks.classification import Classification
from .loading import LoadedModel, from_transformers

NAME = "digits"
IMAGE_SIZE = 16
EVAL_EVERY = 4


def load_digits() -> DatasetDict:
    """The digits as ``image`` and ``label`` columns; every fourth image is the ``test`` split."""
    try:
        from sklearn import datasets as sklearn_datasets
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install 'skipat-surgery[demo]'") from error

    digits = sklearn_datasets.load_digits()
    images = [Image.fromarray((255 / 16 * pixels).astype("uint8")) for pixels in digits.images]
    labels = [int(label) for label in digits.target]
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    splits = {}
    for split, inside in (("train", False), ("test", True)):
        rows = [i for i in range(len(images)) if (i % EVAL_EVERY == 0) == inside]
        columns = {"image": [images[i] for i in rows], "label": [labels[i] for i in rows]}
        splits[split] = Dataset.from_dict(columns, features=features)
    return DatasetDict(splits)


def train_teacher(seed: int = 0, steps: int = 450, batch_size: int = 64) -> LoadedModel:
    """Train a 12-block ViT of width 64 on the digits, 4×4 patches of 2×2 pixels each: a minute on two CPU cores."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=12,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=IMAGE_SIZE,
        patch_size=4,
        id2label={i: str(i) for i in range(10)},
        label2id={str(i): i for i in range(10)},
    )
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = ViTImageProcessor(size=side, image_mean=[0.3] * 3, image_std=[0.4] * 3)
    host = from_transformers(ViTForImageClassification(config), processor)
    train = load_digits()["train"]
    pixels = host.preprocess([image.convert(host.image_mode) for image in train["image"]])
    fit(host.model, pixels, torch.tensor(train["label"]), steps, batch_size)
    return host


def fit(model: nn.Module, pixels: Tensor, labels: Tensor, steps: int, batch_size: int = 64) -> None:
    """Train a small ViT on images in memory: Muon for its matrices, AdamW for the rest, random shifts of the images.

    Args:
        model: A classifier of transformers or timm, without a cut.
        pixels: (n, C, H, W).
        labels: (n,).
        steps: Optimiser steps.
        batch_size: Images a step.
    """
    model.train()
    chosen_by = optimizers(model, learning_rate=1e-3, muon_learning_rate=5e-3, weight_decay=0.05)
    schedules = [get_cosine_schedule_with_warmup(optimizer, steps // 5, steps) for optimizer in chosen_by]
    with tqdm(range(steps), desc="Training the teacher on digits", unit="step") as bar:
        for _ in bar:
            chosen = torch.randint(len(pixels), (batch_size,))
            shift = torch.randint(-2, 3, (2,)).tolist()
            logits = Classification().read(model(torch.roll(pixels[chosen], shift, dims=(2, 3))))["logits"]
            loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            loss.backward()
            for optimizer, schedule in zip(chosen_by, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
