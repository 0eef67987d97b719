"""Attention maps of a cut transformers model: an entry for each block, None for a skipped one.

transformers collects the maps that the attention modules return. A skipped block has none, and the list would close
up: entry 3 would be the map of block 9. A hook on the model that collects them puts the gaps back.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


def is_attentions(value: Any, count: int, axes: tuple[int, ...] = (4,), exactly: bool = False) -> bool:
    """Whether this entry of an output is the attention maps, (B, heads, N, N), of so many blocks or more.

    SAM gives (B·heads, N, N): maps may have any of these numbers of `axes`. Swin gives feature maps beside them, one
    more than there are stages: there it must be `exactly` so many.
    """
    return (
        isinstance(value, tuple)
        and (len(value) == count if exactly else len(value) >= count)
        and all(isinstance(m, Tensor) and m.ndim in axes and m.shape[-2] == m.shape[-1] for m in value)
    )


class FillAttentions:
    """The hook: spreads the maps of the attended blocks over all blocks.

    Args:
        skip: The skipped blocks.
        depth: The number of blocks.
        axes: How many axes a map may have.
        exactly: Whether there are no more maps than attended blocks.
    """

    def __init__(self, skip: tuple[int, ...], depth: int, axes: tuple[int, ...] = (4,), exactly: bool = False) -> None:
        self.skip, self.depth, self.axes, self.exactly = skip, depth, axes, exactly

    def __call__(self, model: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # as return_dict=False gives it, attention maps last
            places = [place for place, value in enumerate(output) if self._are_maps(value)]
            if not places:
                return output
            filled = (*output[: places[-1]], self.by_block(output[places[-1]]), *output[places[-1] + 1 :])
            return filled
        if self._are_maps(getattr(output, "attentions", None)):
            output["attentions"] = self.by_block(output.attentions)
        return output

    def _are_maps(self, value: Any) -> bool:
        return is_attentions(value, self.depth - len(self.skip), self.axes, self.exactly)

    def by_block(self, maps: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """The maps by block; the last blocks of VidEoMT run once for each frame."""
        rest = iter(maps)
        return (*(None if index in self.skip else next(rest) for index in range(self.depth)), *rest)


def collector_of(model: nn.Module, tower: nn.Module) -> nn.Module:
    """What collects the attention maps of a tower: the innermost model of transformers that is it or holds it."""
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return next((module for module in reversed(models) if any(part is tower for part in module.modules())), tower)


def fill_attentions(
    collector: nn.Module, blocks: Sized, skip: tuple[int, ...], axes: tuple[int, ...] = (4,), exactly: bool = False
) -> None:
    """Put the hook on what collects the maps of these blocks."""
    collector.register_forward_hook(FillAttentions(skip, len(blocks), axes, exactly))


def unfill_attentions(model: nn.Module) -> None:
    """Take it off again, wherever it is in a model."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, FillAttentions):
                del module._forward_hooks[key]
