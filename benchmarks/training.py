"""Training of the small models that benchmarks are made on: what was interrupted goes on where it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from subjects import bf16
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from skipat_surgery.convert.optimizers import optimizers

SAVED_EVERY = 50


def train(
    model: nn.Module,
    file: Path,
    steps: int,
    loss_of: Callable[[int], Tensor],
    *,
    learning_rate: float,
    muon_learning_rate: float,
    name: str,
) -> None:
    """Give a model the weights of a file; where there is none, train the model and write it.

    What was interrupted goes on where it was, at most `SAVED_EVERY` steps before.

    Args:
        model: With fresh weights.
        file: Of the weights.
        steps: Optimizer steps.
        loss_of: From the number of a step, its loss, under autocast to bfloat16.
        learning_rate: Of AdamW.
        muon_learning_rate: Of Muon.
        name: Of the model, for the bar.
    """
    if file.exists():
        model.load_state_dict(load_file(file))
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    chosen = optimizers(model, learning_rate=learning_rate, muon_learning_rate=muon_learning_rate)
    schedules = [get_cosine_schedule_with_warmup(optimizer, steps // 20, steps) for optimizer in chosen]
    parts, state = [model, *chosen, *schedules], file.with_suffix(".state")
    first = _resume(parts, state)
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=f"Training the {name}", unit="step")
    for step in bar:
        with bf16():
            loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(chosen, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % SAVED_EVERY == 0:
            torch.save([step + 1, *(part.state_dict() for part in parts)], state)
    save_file(model.state_dict(), file)
    state.unlink(missing_ok=True)


def _resume(parts: list[Any], state: Path) -> int:
    """Load what is trained, its optimizers and their schedules; the step to go on with."""
    if not state.exists():
        return 0
    step, *states = torch.load(state)
    for part, loaded in zip(parts, states, strict=True):
        part.load_state_dict(loaded)
    return step
