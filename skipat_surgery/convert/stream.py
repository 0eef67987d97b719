"""The order of the training images, so that a run can be resumed exactly, from a table or from a stream."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset, Sampler, get_worker_info


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


@dataclass(frozen=True)
class Streamed:
    """Items whose rows come one after another and cannot be asked for by number, such as shards of the Hub.

    Args:
        rows: The rows of an epoch, in the order that the epoch draws.
        item: What becomes of the row at a position in the run.
    """

    rows: Callable[[int], Iterable[Any]]
    item: Callable[[int, Any], Any]

    def places(self, start: int, total: int) -> Iterator[tuple[int, Any]]:
        """(position, row) from `start` to `total`, over as many epochs as it takes.

        The rows before `start` are read again, and nothing is made of them.

        Raises:
            ValueError: There are no rows.
        """
        position = 0
        for epoch in itertools.count():
            first = position
            for row in self.rows(epoch):
                if position == total:
                    return
                if position >= start:
                    yield position, row
                position += 1
            if position == first:
                raise ValueError("the stream of training images is empty")


class Share(IterableDataset):
    """The items of one process among several, from a position to the end.

    Every process and worker reads all rows, and makes items of its own alone: of batch after batch, those that a
    sampler over a table would give it.
    """

    def __init__(
        self, items: Streamed, start: int, total: int, batch_size: int, process: int = 0, processes: int = 1
    ) -> None:
        self.items, self.start, self.total = items, start, total
        self.batch_size, self.process, self.processes = batch_size, process, processes

    def __len__(self) -> int:
        return (self.total - self.start) // self.processes

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for position, row in self.items.places(self.start, self.total):
            batch, process = divmod((position - self.start) // self.batch_size, self.processes)
            if process == self.process and batch % workers == number:
                yield self.items.item(position, row)
