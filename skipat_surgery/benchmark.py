"""Throughput and FLOPs of a cut model beside the untouched one, measured side by side in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from .capture import Tower, evaluating
from .report import count_macs


def gflops(model: nn.Module) -> float:
    """GFLOPs of a model's vision tower for one image, by torch's FLOP counter (a multiply-add is two)."""
    tower = Tower.of(model)
    total, _ = count_macs(tower.module, tower.family)
    return 2 * total / 1e9


def throughput(
    models: Mapping[str, nn.Module],
    images: Tensor,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    rounds: int = 15,
) -> dict[str, float]:
    """Images per second of each model: medians of interleaved rounds, so that noise meets all of them alike.

    Args:
        models: The models, by name.
        images: One batch (B, C, H, W), on the models' device.
        autocast: Gives the context that sets the precision.
        rounds: How often each model runs, after two warm-up rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    with evaluating(*models.values()):
        for turn in range(rounds + 2):
            for name, model in models.items():
                synchronize(images)
                start = time.perf_counter()
                with autocast():
                    model(images)
                synchronize(images)
                if turn >= 2:
                    times[name].append(time.perf_counter() - start)
    return {name: len(images) / statistics.median(values) for name, values in times.items()}


def synchronize(tensor: Tensor) -> None:
    """Wait until a tensor's device has done its work."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
