"""The order of the training images, so that a run can be resumed exactly."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class Stream(Sampler):
    """The whole run as one stream of (position, index): a fresh permutation each epoch, from any position on."""

    def __init__(self, length: int, total: int, seed: int, start: int = 0) -> None:
        self.length, self.total, self.seed, self.start = length, total, seed, start

    def __len__(self) -> int:
        return self.total - self.start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, order = -1, torch.empty(0)
        for position in range(self.start, self.total):
            if position // self.length != epoch:
                epoch = position // self.length
                generator = torch.Generator().manual_seed(self.seed + epoch)
                order = torch.randperm(self.length, generator=generator)
            yield position, int(order[position % self.length])
