"""The settings of a distillation, as a command takes them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from .losses import LossWeights
from .optimizers import LEARNING_RATE, MUON_LEARNING_RATE, WEIGHT_DECAY

NOT_NEGATIVE = (
    "muon_learning_rate",
    "weight_decay",
    "mixup",
    "warmup_steps",
    "kl_weight",
    "head_weight",
    "prefix_weight",
    "patch_weight",
    "block_weight",
    "label_weight",
    "num_workers",
)


def option(default: Any, text: str) -> Any:
    """A dataclass field with a help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. Every random draw is a function of the seed and the step, so that a resumed run is the same run."""

    max_steps: int = option(120, "Optimiser steps; 0 leaves the distillation out.")
    batch_size: int = option(64, "Images a step on each process, before gradient accumulation.")
    gradient_accumulation_steps: int = option(1, "Batches summed into one optimiser step.")
    learning_rate: float = option(LEARNING_RATE, "Peak rate of AdamW, which trains what Muon does not.")
    muon_learning_rate: float = option(
        MUON_LEARNING_RATE, "Peak rate of Muon on the blocks' matrices; 0 leaves all to AdamW."
    )
    rate_scale: float | None = option(
        None, "Both rates are multiplied by it; when left out, a short probe finds the largest that loses nothing."
    )
    weight_decay: float = option(WEIGHT_DECAY, "Decoupled weight decay of all matrices.")
    warmup_steps: int = option(15, "Steps to warm up; a cosine to zero follows.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.")
    ema_decay: float = option(
        0.0, "Decay of the moving average that is measured and saved; 0 uses the weights themselves."
    )
    mixup: float = option(0.0, "Mixup's alpha; student and teacher see the same mixture. 0 mixes nothing.")
    min_crop_scale: float = option(1.0, "Training crops hold at least this share of the image.")
    kl_weight: float = option(LossWeights.kl, "Weight of the KL divergence between the class distributions.")
    head_weight: float = option(LossWeights.head, "Weight of the distance between what other heads give, by task.")
    prefix_weight: float = option(LossWeights.prefix, "Weight of 1 - cosine between the final CLS tokens.")
    patch_weight: float = option(
        LossWeights.patches, "Weight of the squared error between the final normed patch tokens."
    )
    block_weight: float = option(LossWeights.blocks, "Weight of the squared error over variance between the blocks.")
    temperature: float = option(LossWeights.temperature, "Temperature of the KL term.")
    label_weight: float = option(
        LossWeights.labels, "Weight of the cross-entropy with the labels; 0 reads none to train."
    )
    eval_steps: int = option(100, "Measure every so many steps; the end is always measured.")
    eval_images: int = option(2000, "Images of a measurement on the way; the last one uses all.")
    checkpoint_steps: int = option(100, "Write a checkpoint to resume from every so many steps.")
    log_steps: int = option(10, "Log the loss every so many steps.")
    num_workers: int = option(0, "Worker processes that load images.")
    seed: int = option(0, "Seed; two runs with one seed are equal.")

    def __post_init__(self) -> None:
        if self.max_steps < 0:
            raise ValueError(f"max_steps must not be negative, got {self.max_steps}; 0 leaves the distillation out")
        for name in (
            "batch_size",
            "gradient_accumulation_steps",
            "eval_steps",
            "eval_images",
            "checkpoint_steps",
            "log_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, and finite, got {getattr(self, name)}")
        if self.rate_scale is not None and not 0 < self.rate_scale < math.inf:
            raise ValueError(f"rate_scale must be positive and finite, got {self.rate_scale}")
        if self.label_weight and self.mixup:
            raise ValueError("mixup leaves an image without a label of its own: set label_weight or mixup to 0")
        if not 0 <= self.ema_decay < 1 or not 0 < self.min_crop_scale <= 1:
            raise ValueError("ema_decay must lie in [0, 1) and min_crop_scale in (0, 1]")

    @property
    def loss_weights(self) -> LossWeights:
        """The weights of the loss terms."""
        return LossWeights(
            kl=self.kl_weight,
            head=self.head_weight,
            prefix=self.prefix_weight,
            patches=self.patch_weight,
            blocks=self.block_weight,
            temperature=self.temperature,
            labels=self.label_weight,
        )
