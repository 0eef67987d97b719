"""A cut tower as it was before, without weights: what its figures are compared with where its blocks are of two kinds.

In a tower of maps some blocks attend within windows and some globally, and all of one kind may be skipped, so that none
is left to compare with; the blocks of one stage cost other than those of another.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.cutting import RECORD, Record, restore_tower
from ..core.grafting import ungraft
from ..core.map_carrying import window_of
from ..core.mlp import Mlp
from ..core.unit_carrying import attends_in_units


def before(tower: nn.Module, record: Record) -> nn.Module:
    """A copy of a cut tower on the meta device, restored.

    Where what was taken out is not there, as in a model that was loaded cut, an MSA is made like that of block 0, or of
    its stage's first.
    """
    removed = [module for slots in (record.removed or {}).values() for module in slots.values() if module is not None]
    memo: dict[int, Any] = {}
    for module in (tower, *removed):
        for tensor in (*module.parameters(), *module.buffers()):
            memo[id(tensor)] = _empty(tensor)
    copied = copy.deepcopy(tower, memo)
    if record.removed is None:
        made = {index: _made_like(copied, record, index) for index in record.config.skip}
        copied.__dict__[RECORD] = replace(record, removed=made)
        for index, width in record.full_widths.items():
            block = record.family.block_list(copied)[index]
            Mlp.of(copied, record.family, index).widen(block, width)
    restore_tower(copied)
    return copied


def _empty(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _made_like(tower: nn.Module, record: Record, index: int) -> dict[str, nn.Module | None]:
    """What was taken out of a block, by slot: copies of those of its stage's first block, with relative positions as
    they were here."""
    family, phi = record.family, record.config.phi[index]
    blocks, stage = family.block_list(tower), family.stage_of(tower, index)
    block: Any = blocks[index]
    first = blocks[stage.blocks.start]
    if block.phi.keeps_msa:
        return {}
    made: dict[str, nn.Module | None] = {}
    for slot in filter(None, (family.attention,) if phi.reads_x else (family.attention, family.norm)):
        module = made[slot] = copy.deepcopy(first.get_submodule(slot))
        ungraft(module)
    if family.stages or not (family.maps or family.pooled):
        return made
    attention: Any = made[family.attention]
    if family.pooled:  # the first MSA of a stage reads the tokens of the one before, and makes their map smaller
        pools = next(name for name in ("q_pool", "q_stride", "query_stride") if hasattr(attention, name))
        setattr(attention, pools, 1 if family.in_units else None)
        if family.in_units:
            attention.use_mask_unit_attn = attends_in_units(block, family)
        attention.qkv = nn.Linear(stage.width, attention.qkv.out_features, device="meta")
        if family.norm in made:
            made[family.norm] = nn.LayerNorm(stage.width, device="meta")
        return made
    sides = (window_of(block),) * 2 if window_of(block) else family.grid(tower)
    for name, side in zip(("rel_pos_h", "rel_pos_w"), sides, strict=True):
        if hasattr(attention, name):
            table = getattr(attention, name)
            setattr(attention, name, nn.Parameter(table.new_empty(2 * side - 1, table.shape[1])))
    return made
