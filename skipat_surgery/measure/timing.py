"""Latency and throughput of models, measured side by side in one process."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from tqdm.auto import tqdm

from ..batches import Images
from ..observing import evaluating, image_part
from ..tower import Tower

WARM_UP = 3


@dataclass(frozen=True)
class Estimate:
    """A median, and the interval that holds the true one in 95 of 100 runs."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """From samples, by their order alone: no distribution is assumed."""
        ordered, half = sorted(values), 0.98 * len(values) ** 0.5
        low = max(0, int(len(values) / 2 - half))
        high = min(len(values) - 1, int(len(values) / 2 + half))
        return cls(statistics.median(values), ordered[low], ordered[high])

    @classmethod
    def of_speed(cls, untouched: Sequence[float], own: Sequence[float]) -> Estimate:
        """How many times as fast as the untouched model another is, from the seconds of both, round by round."""
        return cls.of([full / part for full, part in zip(untouched, own, strict=True)])

    def as_speed(self) -> str:
        """With its interval, as tables show it."""
        return f"{self.value:.2f}× ({self.low:.2f}–{self.high:.2f})"


def latencies(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int = 15,
    max_seconds: float | None = None,
    progress: bool = False,
) -> dict[str, list[float]]:
    """Seconds of each call, round by round.

    Every round runs every call once, in an order drawn anew, so that noise and the state of caches meet all alike.
    Rounds can be compared pair by pair.

    Args:
        calls: What to time, by name.
        device: Where they run; on CUDA the time is the device's, between two events.
        rounds: How many, after up to `WARM_UP` more that do not count.
        max_seconds: Fewer rounds, though at least five, where they would take longer.
        progress: Whether to show a bar.
    """
    order, drawn = list(calls), random.Random(0)
    found: dict[str, list[float]] = {name: [] for name in calls}
    begin = start = time.perf_counter()
    for _ in range(WARM_UP):
        start = time.perf_counter()
        for name in order:
            seconds_of(calls[name], device)
        if max_seconds is not None and time.perf_counter() - begin > max_seconds:
            break
    if max_seconds is not None:
        rounds = max(5, min(rounds, round(max_seconds / (time.perf_counter() - start))))
    for _ in tqdm(range(rounds), desc="Timing", unit="round", disable=not progress, leave=False):
        drawn.shuffle(order)
        for name in order:
            found[name].append(seconds_of(calls[name], device))
    return found


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """How long one call takes."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000


def throughput(
    models: Mapping[str, nn.Module],
    images: Images,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    rounds: int = 15,
) -> dict[str, float]:
    """Images per second of each model, or of its vision tower where it takes text too; the median of many rounds.

    Args:
        models: The models, by name.
        images: One batch (B, C, H, W), of videos (B, T, C, H, W) or of patches, on the models' device.
        autocast: Gives the context that sets the precision.
        rounds: How often each model runs.
    """

    tower = Tower.of(next(iter(models.values())))

    def forward(model: nn.Module) -> object:
        with autocast():
            return tower.run(images, model)

    with evaluating(*models.values()):
        calls = {name: partial(forward, image_part(model)) for name, model in models.items()}
        seconds = latencies(calls, images.device, rounds)
    return {name: len(images) / statistics.median(values) for name, values in seconds.items()}
