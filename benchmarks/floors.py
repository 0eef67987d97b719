"""The least that a forward can take on a machine: what it computes, and what it must move, at the machine's own rates.

The rates are measured, not looked up: a large matrix product for operations, a large copy for bytes. `traffic` counts
what an eager forward moves, every operation reading its inputs and writing its outputs; `needed` what no fusion spares,
the weights, the images and the output.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from skipat_surgery.measure.timing import seconds_of


@dataclass(frozen=True)
class Rates:
    """What a machine reaches.

    Args:
        flops: Operations a second, in one precision.
        bandwidth: Bytes a second.
    """

    flops: float
    bandwidth: float

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype, side: int | None = None, rounds: int = 10) -> Rates:
        """Medians of a product of two (side, side) matrices, and of a copy of one sixteen times as large."""
        side = side or (8192 if device.type == "cuda" else 1024)
        matrix = torch.randn(side, side, device=device, dtype=dtype)
        source = torch.empty(16, side, side, device=device, dtype=dtype).zero_()
        target = torch.empty_like(source)
        product = [seconds_of(lambda: matrix @ matrix, device) for _ in range(rounds + 3)][3:]
        copy = [seconds_of(lambda: target.copy_(source), device) for _ in range(rounds + 3)][3:]
        return cls(2 * side**3 / statistics.median(product), 2 * source.nbytes / statistics.median(copy))


@dataclass(frozen=True)
class Work:
    """What a forward of a batch does.

    Args:
        flops: Operations of its matrix products.
        needed: Bytes of weights, images and output.
        traffic: Bytes that its operations read and write, one after the other.
    """

    flops: int
    needed: int
    traffic: int

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, images: Tensor) -> Work:
        """Of a model on a batch (B, C, H, W)."""
        with FlopCounterMode(display=False) as counter, Traffic() as traffic:
            output = model(images)
        weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        return cls(counter.get_total_flops(), weights + images.nbytes + _bytes(output), traffic.bytes)

    def floor(self, rates: Rates) -> float:
        """Seconds that it takes at least where everything is fused: whichever is slower, computing or moving."""
        return max(self.flops / rates.flops, self.needed / rates.bandwidth)

    def eager_floor(self, rates: Rates) -> float:
        """Seconds that it takes at least where no operation is fused with the next."""
        return max(self.flops / rates.flops, self.traffic / rates.bandwidth)


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write; a view moves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        read, written = _storages((args, kwargs)), _storages(found)
        writes = any(given.alias_info is not None and given.alias_info.is_write for given in func._schema.arguments)
        if writes or not written <= read:
            self.bytes += _bytes((args, kwargs)) + _bytes(found)
        return found


def _storages(values: Any) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}


def _bytes(values: Any) -> int:
    values = list(values.values()) if isinstance(values, dict) else values
    return sum(leaf.nbytes for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
