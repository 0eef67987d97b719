"""Attention maps of a cut transformers model: an entry for each block, None for a skipped one.

transformers collects the maps that the attention modules return. A skipped block has none, and the list would close
up: entry 3 would be the map of block 9. A hook on the tower puts the gaps back.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .family import Family


def is_attentions(value: Any, count: int) -> bool:
    """Whether this entry of an output is the attention maps, (B, heads, N, N), of so many blocks."""
    return (
        isinstance(value, tuple)
        and len(value) == count
        and all(isinstance(map_, Tensor) and map_.ndim == 4 and map_.shape[2] == map_.shape[3] for map_ in value)
    )


class FillAttentions:
    """The hook: spreads the maps of the attended blocks over all blocks.

    Args:
        skip: The skipped blocks.
        depth: The number of blocks.
    """

    def __init__(self, skip: tuple[int, ...], depth: int) -> None:
        self.skip, self.depth = skip, depth

    def __call__(self, tower: nn.Module, args: Any, output: Any) -> Any:
        attended = self.depth - len(self.skip)
        if isinstance(output, tuple):  # as return_dict=False gives it, attention maps last
            places = [place for place, value in enumerate(output) if is_attentions(value, attended)]
            if not places:
                return output
            filled = (*output[: places[-1]], self.by_block(output[places[-1]]), *output[places[-1] + 1 :])
            return filled
        if is_attentions(getattr(output, "attentions", None), attended):
            output["attentions"] = self.by_block(output.attentions)
        return output

    def by_block(self, maps: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """The maps by block."""
        rest = iter(maps)
        return tuple(None if index in self.skip else next(rest) for index in range(self.depth))


def fill_attentions(tower: nn.Module, family: Family, skip: tuple[int, ...]) -> None:
    """Put the hook on a tower."""
    tower.register_forward_hook(FillAttentions(skip, len(family.block_list(tower))))


def unfill_attentions(tower: nn.Module) -> None:
    """Take it off again."""
    for key, hook in list(tower._forward_hooks.items()):
        if isinstance(hook, FillAttentions):
            del tower._forward_hooks[key]
