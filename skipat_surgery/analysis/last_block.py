"""The last block as object discovery reads it: how CLS attends to the patches, and the keys of these.

Both are computed on the side, from the host's own projections, so that attention may be fused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..core.carrying import first_argument
from ..core.packed import laid_out
from ..core.prefix_attention import scores_of
from ..core.projections import Projections, attention_weights, heads
from ..core.tokens import Patches, Special
from ..observing import evaluating
from ..tower import Tower

CLS = Special(prefix=1, suffix=0)


@dataclass(frozen=True)
class LastBlock:
    """What the last block makes of some images, in float32.

    Args:
        attention: A^[CLS] among the patches, (B, heads, H, W); None for a model without a prefix token.
        keys: (B, H, W, D), as the projection gives them, before any norm or rotation; those of all heads in a row.
    """

    attention: Tensor | None
    keys: Tensor


def check_last_block(tower: Tower) -> None:
    """Check that the last block of a tower attends, in a way that can be read.

    Raises:
        ValueError: It is skipped, or its attention is of a kind that cannot be read.
    """
    last = len(tower.blocks) - 1
    if last in tower.skip:
        raise ValueError(
            f"the last block, {last}, is skipped, so it has neither A^[CLS] nor keys to find objects by: cut blocks "
            f"below it, such as {last - 2}-{last - 1}"
        )
    if tower.gives_windows(last):
        raise ValueError(f"the last block, {last}, attends within windows, so no object can be found by its keys")
    attention = tower.msa_slot(last)
    if not tower.family.attends(attention):
        raise ValueError(f"the keys of {type(attention).__name__}, the MSA of block {last}, cannot be read")


def read_last_block(tower: Tower, images: Tensor) -> LastBlock:
    """Run a tower on images (B, C, height, width), and keep what its last block attends to.

    Raises:
        ValueError: As `check_last_block`, or the MSA subtracts maps from each other (differential attention).
    """
    check_last_block(tower)
    seen: list[tuple[Tensor | None, Tensor]] = []
    prefix, suffix = (count(tower.module) for count in (tower.family.num_prefix_tokens, tower.family.num_suffix_tokens))
    patches = Patches(prefix, suffix)

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        h, msa = laid_out(None, first_argument(args, kwargs)), tower.family.projections(module, *args, **kwargs)
        h = h if units is None else units.tokens(h, grid)
        attention = patches.take(cls_attention(msa, h), dim=2) if prefix else None
        seen.append((attention, patches.take(msa.key.apply(h))))

    last = len(tower.blocks) - 1
    grid, units = tower.stage_of(last).grid(tower.grid(images)), tower.stage_of(last).units
    handle = tower.msa_slot(last).register_forward_pre_hook(read, with_kwargs=True)
    try:
        with evaluating(tower.module):
            tower.run(images)
    finally:
        handle.remove()
    ((attention, keys),) = seen
    return LastBlock(
        None if attention is None else attention.float().unflatten(2, grid), keys.float().unflatten(1, grid)
    )


def cls_attention(msa: Projections, h: Tensor) -> Tensor:
    """A^[CLS] (B, heads, N): the first token's row of the attention weights, from LN(X) (B, N, D).

    Raises:
        ValueError: The MSA subtracts maps from each other.
    """
    if msa.combine is not None:
        raise ValueError("the MSA of the last block subtracts maps (differential attention), so it has no one A^[CLS]")
    query = heads(msa.query.apply(CLS.take(h)), msa.num_heads)
    query = query if msa.norm_query is None else msa.norm_query(query)  # rotary embeddings leave the first token alone
    return attention_weights(scores_of(msa, query * msa.scale, h), msa.bias(CLS), dropout=0.0)[:, :, 0]
