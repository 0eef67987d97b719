"""`distill`: the recipe's losses and optimizers in one call, for one process and a program of one's own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from ..observing import labels_of, pixels_of
from ..result import Result, titled_table
from ..tasks.finding import task_of
from ..tasks.task import Task
from ..tower import check_pair
from .align import repeated
from .finite import check_loss, check_precision, in_float16
from .losses import LossWeights, distances, distillation_loss, label_loss
from .optimizers import LEARNING_RATE, MUON_LEARNING_RATE, WEIGHT_DECAY, freeze_untouched, optimizers
from .rates import STEPS, probe
from .sharing import outputs_of_both, train_mode


@dataclass(frozen=True)
class DistillResult(Result):
    """What the distillation did.

    Args:
        losses: The loss of each step.
        rate_scale: What both rates were multiplied by.
    """

    losses: tuple[float, ...]
    rate_scale: float

    def table(self) -> Table:
        """The loss at the start, half-way and at the end."""
        shown = titled_table(f"Distilled for {len(self.losses):,} steps", "step", "loss")
        for step in sorted({0, len(self.losses) // 2, len(self.losses) - 1}):
            shown.add_row(str(step + 1), f"{self.losses[step]:.4f}")
        return shown


def distill(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int = 540,
    weights: LossWeights | None = None,
    learning_rate: float = LEARNING_RATE,
    muon_learning_rate: float = MUON_LEARNING_RATE,
    rate_scale: float | None = None,
    weight_decay: float = WEIGHT_DECAY,
    warmup_steps: int | None = None,
    max_grad_norm: float = 1.0,
    task: Task | None = None,
    progress: bool = True,
) -> DistillResult:
    """Train a cut model end to end against the model it was made from, in place.

    Student and teacher see the same images. What lies before the first skipped block stays as it is; all the rest is
    trained, Muon for the matrices of the blocks and AdamW for what remains. The models stay where they are, in float32:
    mixed precision is `torch.autocast` around the call. `recipes/distill.py` adds several processes, resuming and
    measuring.

    Args:
        student: A cut model; best solved first.
        teacher: The model it was made from, untouched.
        batches: Batches of images (B, C, H, W) or videos (B, T, C, H, W), ``(images, labels)`` pairs, or mappings with
            ``pixel_values`` and perhaps ``labels``. They are gone through again where they are fewer than `steps`.
        steps: Optimizer steps, one a batch.
        weights: What each term of the loss counts; ``LossWeights()`` when left out.
        learning_rate: Peak rate of AdamW; a cosine to zero follows the warm-up.
        muon_learning_rate: Peak rate of Muon; 0 leaves all to AdamW.
        rate_scale: Both rates are multiplied by it. When left out, it is the largest at which the first steps do not
            lose what the start has, found by a short probe (`rates.probe`).
        weight_decay: Decoupled, of all matrices.
        warmup_steps: Steps to warm up; a thirteenth of `steps` when left out.
        max_grad_norm: Gradients are clipped to this norm.
        task: What both models are for, which says how their outputs are compared; found from their class when left out.
        progress: Whether to show a bar.

    Raises:
        ValueError: The model is not cut, the teacher is, either is in half precision, or there are no images, or no
            labels where they are to count.
        FloatingPointError: The loss is not finite; the student is then as the step before left it.

    Examples:
        >>> import copy
        >>> import timm
        >>> import torch
        >>> import skipat_surgery
        >>> small = dict(img_size=32, patch_size=8, embed_dim=32, depth=6, num_heads=2, num_classes=4)
        >>> teacher = timm.create_model("vit_tiny_patch16_224", **small).eval()
        >>> student = skipat_surgery.apply(copy.deepcopy(teacher), skip=[2, 3])
        >>> batches = torch.randn(64, 3, 32, 32).split(16)
        >>> solved = skipat_surgery.solve(student, teacher, batches, progress=False)
        >>> result = skipat_surgery.distill(student, teacher, batches, steps=4, progress=False)
        >>> len(result.losses)
        4
    """
    weights = LossWeights() if weights is None else weights
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    towers = check_pair(student, teacher)
    check_precision(student, teacher)
    first, depth = towers[0].first_changed, len(towers[0].blocks)
    states = range(first, depth - 1) if weights.blocks else ()
    modes = {module: module.training for model in (student, teacher) for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in student.parameters()}
    task = task_of(teacher) if task is None else task
    freeze_untouched(student, task)

    def make(scale: float) -> list[torch.optim.Optimizer]:
        rates = {"learning_rate": scale * learning_rate, "muon_learning_rate": scale * muon_learning_rate}
        return optimizers(student, weight_decay=weight_decay, **rates)

    def loss_of(batch: Any) -> Tensor:
        images, labels = pixels_of(batch).to(device), labels_of(batch) if weights.labels else None
        found, expected = outputs_of_both(
            (student, towers[0]), (teacher, towers[1]), images, states, share=True, task=task
        )
        terms = distances(found, expected, towers[0].num_special_tokens, weights.temperature)
        if weights.labels:
            terms["labels"] = _label_term(found.logits, labels)
        return distillation_loss(terms, weights)

    warmup = steps // 13 if warmup_steps is None else warmup_steps
    losses: list[float] = []
    device = next(student.parameters()).device
    bar = tqdm(repeated(batches, steps), total=steps, desc="Distilling", unit="step", disable=not progress)
    try:
        teacher.eval()
        train_mode(student, towers[0], task)
        if rate_scale is None:
            rate_scale = probe(student, loss_of, make, list(repeated(batches, STEPS + 1)), max_grad_norm)
        chosen = make(rate_scale)
        schedules = [get_cosine_schedule_with_warmup(optimizer, warmup, steps) for optimizer in chosen]
        for batch in bar:
            loss = loss_of(batch)
            value, float16 = float(loss.detach()), in_float16(device)
            check_loss(value, len(losses) + 1, student, teacher, pixels_of(batch), float16=float16)
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), max_grad_norm)
            for optimizer, schedule in zip(chosen, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            torch.clear_autocast_cache()  # inside autocast, the next step would run on the weights before this one
            losses.append(value)
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, trained in wanted.items():
            parameter.requires_grad_(trained)
            parameter.grad = None
        torch.clear_autocast_cache()
    return DistillResult(tuple(losses), rate_scale)


def _label_term(logits: Tensor | None, labels: Any) -> Tensor:
    """Cross-entropy with the labels of each image.

    Raises:
        ValueError: The model has no classes, or the batch no labels.
    """
    if logits is None or labels is None:
        raise ValueError("weights.labels needs a model with classes and batches with labels: leave it 0")
    return label_loss(logits, labels)
