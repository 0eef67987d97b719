"""The recipe in this process, on a small model of the digits: a run costs a second or two."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from skipat_surgery.commands import digits, loading
from skipat_surgery.commands.arguments import Arguments
from skipat_surgery.commands.distill import Recipe
from skipat_surgery.convert.settings import TrainingConfig

SHAPE = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 64}
SHORT = {"max_steps": 4, "batch_size": 16, "warmup_steps": 0, "eval_steps": 1, "checkpoint_steps": 2, "rate_scale": 1.0}


def small_teacher(folder: Path) -> None:
    """A classifier of the digits, trained for a few seconds."""
    torch.manual_seed(0)
    side = digits.IMAGE_SIZE
    config = ViTConfig(**SHAPE, image_size=side, patch_size=4, id2label={i: str(i) for i in range(10)})
    processor = ViTImageProcessor(size={"height": side, "width": side}, image_mean=[0.3] * 3, image_std=[0.4] * 3)
    host = loading.from_transformers(ViTForImageClassification(config), processor)
    train = digits.load_digits()["train"]
    pixels = host.preprocess([image.convert("RGB") for image in train["image"]])
    digits.fit(host.model, pixels, torch.tensor(train["label"]), steps=150)
    host.save(host.model, folder)


def recipe(model: Path, output: Path, **given: Any) -> Recipe:
    """The recipe on the digits, checked and not begun."""
    arguments = {"solve_images": 256, "skip": "2-3", "mixed_precision": "no"}
    training = {**SHORT, **{name: value for name, value in given.items() if hasattr(TrainingConfig, name)}}
    arguments |= {name: value for name, value in given.items() if name not in training}
    with patch("skipat_surgery.commands.distill.use_all_cores"):  # the tests share the cores out themselves
        return Recipe(Arguments(model=str(model), output_dir=str(output), **arguments), TrainingConfig(**training))
