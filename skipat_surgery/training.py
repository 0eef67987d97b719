"""The training loop of a distillation, on any number of processes, resumable to the bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from . import checkpoints
from .capture import Tower
from .checkpoints import Progress
from .distill import LossWeights, Outputs, distances, distillation_loss, mixup, optimizers, run
from .images import NO_LABEL, Stream
from .sharing import front, keep_input, started_at


def option(default: Any, text: str) -> Any:
    """A dataclass field with a help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. Every random draw is a function of the seed and the step, so that a resumed run is the same run."""

    max_steps: int = option(120, "Optimiser steps; 0 leaves the distillation out.")
    batch_size: int = option(64, "Images a step on each process, before gradient accumulation.")
    gradient_accumulation_steps: int = option(1, "Batches summed into one optimiser step.")
    learning_rate: float = option(1e-3, "Peak rate of AdamW, which trains what Muon does not.")
    muon_learning_rate: float = option(7e-4, "Peak rate of Muon on the blocks' weight matrices; 0 leaves all to AdamW.")
    weight_decay: float = option(0.01, "Decoupled weight decay of all matrices.")
    warmup_steps: int = option(15, "Steps to warm up; a cosine to zero follows.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.")
    ema_decay: float = option(
        0.0, "Decay of the moving average that is measured and saved; 0 uses the weights themselves."
    )
    mixup: float = option(0.0, "Mixup's alpha; student and teacher see the same mixture. 0 mixes nothing.")
    min_crop_scale: float = option(1.0, "Training crops hold at least this share of the image.")
    kl_weight: float = option(1.0, "Weight of the KL divergence between the class distributions.")
    prefix_weight: float = option(0.5, "Weight of 1 - cosine between the final CLS tokens.")
    patch_weight: float = option(0.5, "Weight of the squared error between the final normalised patch tokens.")
    block_weight: float = option(15.0, "Weight of the squared error over variance between the blocks.")
    temperature: float = option(1.0, "Temperature of the KL term.")
    label_weight: float = option(0.0, "Weight of the cross-entropy with the labels; 0 reads none in training.")
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
            "checkpoint_steps",
            "log_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm", "temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("muon_learning_rate", "weight_decay", "mixup", "warmup_steps", "block_weight", "label_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.label_weight and self.mixup:
            raise ValueError("mixup leaves an image without a label of its own: set label_weight or mixup to 0")
        if not 0 <= self.ema_decay < 1 or not 0 < self.min_crop_scale <= 1:
            raise ValueError("ema_decay must lie in [0, 1) and min_crop_scale in (0, 1]")

    @property
    def loss_weights(self) -> LossWeights:
        """The weights of the loss terms."""
        terms = self.kl_weight, self.prefix_weight, self.patch_weight, self.block_weight
        return LossWeights(*terms, self.temperature, self.label_weight)


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy for each image (B,) of the logits (B, classes) with labels (B,); 0 where the label is unknown."""
    return F.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="none")


class Training:
    """A distillation in progress: the student and all that must be saved to go on with it.

    Args:
        student: The cut model.
        teacher: The model it learns from, on the accelerator's device, in evaluation mode.
        accelerator: What places and wraps everything.
        config: How to train.
        folder: Where checkpoints are written.
        progress: How far the run has come.
        share: Whether the teacher is the very model that was cut: what lies before the first skipped block is then run
            once for both.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        accelerator: Accelerator,
        config: TrainingConfig,
        folder: Path,
        progress: Progress,
        share: bool = False,
    ) -> None:
        self.share = share
        self.plain, self.teacher, self.accelerator, self.config = student, teacher, accelerator, config
        self.folder, self.progress = folder, progress
        self.unread = 0
        self.tower, self.teacher_tower = Tower.of(student), Tower.of(teacher)
        average = get_ema_multi_avg_fn(config.ema_decay)
        self.ema = AveragedModel(student, multi_avg_fn=average) if config.ema_decay else None
        rates = config.learning_rate, config.muon_learning_rate
        prepared = accelerator.prepare(student, *optimizers(student, *rates, config.weight_decay))
        self.student, self.optimizers = prepared[0], prepared[1:]
        self.schedules = [
            get_cosine_schedule_with_warmup(optimizer.optimizer, config.warmup_steps, config.max_steps)
            for optimizer in self.optimizers
        ]
        for item in (progress, *self.schedules, *filter(None, [self.ema])):
            accelerator.register_for_checkpointing(item)

    @property
    def result(self) -> nn.Module:
        """The model to measure and save: the moving average where there is one."""
        return self.plain if self.ema is None else self.ema.module

    def loader(self, items: torch.utils.data.Dataset, collate: Callable[[Any], Any]) -> DataLoader:
        """The batches from the present step to the last, this process's share."""
        config = self.config
        per_step = config.batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes
        total, start = config.max_steps * per_step, self.progress.step * per_step
        stream = Stream(len(items), total, config.seed, start)  # type: ignore[arg-type]
        loader = DataLoader(
            items, config.batch_size, sampler=stream, collate_fn=collate, num_workers=config.num_workers, drop_last=True
        )
        return self.accelerator.prepare(loader)

    def fit(self, loader: DataLoader, measure: Callable[[int], None]) -> None:
        """Train to the last step, with a progress bar.

        Args:
            loader: What `loader` gave.
            measure: Called with the step on the schedule of evaluation, on every process.
        """
        config, progress = self.config, self.progress
        self._train_mode()
        bar = tqdm(
            total=config.max_steps,
            initial=progress.step,
            desc="Distilling",
            unit="step",
            disable=not self.accelerator.is_local_main_process,
        )
        micro_step = progress.step * config.gradient_accumulation_steps
        started = time.perf_counter()
        losses: list[float] = []
        for batch in loader:
            losses.append(self._step(batch, micro_step))
            micro_step += 1
            if not self.accelerator.sync_gradients:
                continue
            progress.step += 1
            progress.seconds += time.perf_counter() - started
            bar.update()
            if progress.step % config.log_steps == 0:
                bar.set_postfix(loss=self._log(losses))
                losses = []
            if progress.step % config.eval_steps == 0 or progress.step == config.max_steps:
                measure(progress.step)
                self._train_mode()
            if progress.step % config.checkpoint_steps == 0 or progress.step == config.max_steps:
                self._count_unread()
            if progress.step % config.checkpoint_steps == 0 and progress.step < config.max_steps:
                checkpoints.save(self.accelerator, self.folder, progress.step)
            started = time.perf_counter()
        bar.close()

    def _step(self, batch: dict[str, torch.Tensor], micro_step: int) -> float:
        """One batch forward and backward, and the optimisers' step where one is due; returns the loss."""
        config, accelerator = self.config, self.accelerator
        # Dropout and mixing draw from here: a function of the step and the process, whatever ran before.
        torch.manual_seed(config.seed + micro_step * accelerator.num_processes + accelerator.process_index)
        generator = torch.Generator().manual_seed(torch.initial_seed())
        images = mixup(batch["pixel_values"], config.mixup, generator)
        with accelerator.accumulate(self.student):
            with accelerator.autocast():
                found, expected = self._run_both(images)
            terms = distances(found, expected, self.tower.num_prefix_tokens, config.temperature)
            if config.label_weight and found.logits is not None:
                terms["labels"] = label_loss(found.logits, batch["labels"])
            loss = distillation_loss(terms, batch["valid"], config.loss_weights)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(self.student.parameters(), config.max_grad_norm)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                for schedule in self.schedules:
                    schedule.step()
                if self.ema is not None:
                    self.ema.update_parameters(self.plain)
        self.unread += int((~batch["valid"]).sum())
        return float(loss.detach())

    def _run_both(self, images: torch.Tensor) -> tuple[Outputs, Outputs]:
        """What student and teacher make of the same images."""
        first, depth = self.tower.skip[0], len(self.tower.blocks)
        same_depth = depth == len(self.teacher_tower.blocks)
        states = range(first, depth - 1) if self.config.block_weight and same_depth else ()
        with keep_input(self.tower.blocks[first]) as seen:
            found = run(self.student, self.tower, images, states)
        shared = started_at(self.teacher_tower, first, seen[0]) if self.share else nullcontext()
        with torch.no_grad(), shared:
            return found, run(self.teacher, self.teacher_tower, images, states)

    def _train_mode(self) -> None:
        """Training mode, but for the frozen blocks, which stay what they are in the teacher."""
        self.student.train()
        for block in front(self.tower):
            block.eval()

    def _count_unread(self) -> None:
        """Add the corrupt images that each process met to the common count."""
        mine = torch.tensor(self.unread, device=self.accelerator.device)
        self.progress.corrupt += int(self.accelerator.reduce(mine, "sum"))
        self.unread = 0

    def _log(self, losses: list[float]) -> str:
        """Log the mean loss of the last steps, over all processes."""
        mean = torch.tensor(losses, device=self.accelerator.device).mean()
        loss = float(self.accelerator.reduce(mean, "mean"))
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {self.progress.step}: lower the learning rates")
        rate = self.schedules[0].get_last_lr()[0]
        self.record({"loss": loss, "learning_rate": rate})
        return f"{loss:.4f}"

    def record(self, values: dict[str, float]) -> None:
        """Add figures of the present step to the history and the trackers."""
        here = {"step": self.progress.step, "seconds": round(self.progress.seconds, 2)}
        self.progress.history.append({**here, **values})
        self.accelerator.log(values, step=self.progress.step)
