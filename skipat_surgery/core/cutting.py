"""The operation itself, on a tower: take the MSA of chosen blocks out, put Φ in, and put everything back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from operator import attrgetter

import torch
from torch import Tensor, nn

from .attention_maps import collector_of, fill_attentions
from .carrying import BoxedNorm, FeedingBlock, PassingBlock, SkippedAttention, SkippedBlock, TappedAttention
from .config import SkipatConfig
from .family import Family
from .folded_carrying import join_in_attention, keep_windows_apart, undo_keep_windows_apart
from .grafting import graft, ungraft
from .grid_carrying import carry_grid, drop_grid
from .in_place import save_memory, undo_save_memory
from .kept_attention import KeptAttention
from .map_carrying import ChannelsFirstBlock, drop_windows, move_windows, undo_windows
from .mlp import Mlp, put
from .phi import Phi
from .stage_carrying import undo_no_windows
from .stages import Stage
from .timm_carrying import move_checkpointing_into_blocks
from .unit_carrying import attends_in_units, put_units_aside

RECORD = "_skipat_record"


@dataclass(frozen=True)
class Record:
    """What was done to a tower. `removed` holds the modules taken out, by block and slot; `full_widths`, of
    blocks whose MLP is narrower, how many hidden units it had.

    The tower keeps it as a plain attribute: the removed modules are no submodules, so they are neither trained, saved
    nor moved. `removed` is None where the model was built cut, from a checkpoint.
    """

    family: Family
    config: SkipatConfig
    removed: dict[int, dict[str, nn.Module | None]] | None
    full_widths: dict[int, int] = field(default_factory=dict)


def records_of(model: nn.Module) -> list[tuple[str, nn.Module, Record]]:
    """The cut towers in a model, as (path, tower, record)."""
    found = [(path, module, module.__dict__.get(RECORD)) for path, module in model.named_modules()]
    return [(path, module, record) for path, module, record in found if record is not None]


def apply_to_tower(
    tower: nn.Module, family: Family, config: SkipatConfig, *, keep_removed: bool, model: nn.Module | None = None
) -> None:
    """Cut a tower in place. Everything has been checked before.

    Args:
        tower: Of this family, untouched.
        family: Its entry.
        config: The blocks to skip, each with its Φ.
        keep_removed: Keep what is taken out, so that `restore_tower` can put it back.
        model: What holds the tower, and may be what collects its attention maps.
    """
    blocks = family.block_list(tower)
    prefix, suffix = family.num_prefix_tokens(tower), family.num_suffix_tokens(tower)
    axes, stages = len(family.grid(tower)), family.stage_list(tower)
    phis = {
        index: Phi(stage.width, prefix, config.phi[index], suffix, axes)
        for stage in stages
        for index in stage.blocks
        if index in config.phi
    }
    for index, phi in phis.items():
        _like(phi, blocks[index])
    if family.checkpoints_calls:
        move_checkpointing_into_blocks(tower, family)
    removed = {i: _skip(blocks[i], family, phi, family.stage_of(tower, i)) for i, phi in phis.items()}
    for index in reached(stages, config):
        feeds_next = index + 1 in phis
        if index in phis:
            blocks[index].skipat_feeds_next = feeds_next  # type: ignore[assignment]
        elif feeds_next:
            _tap(blocks[index], family, tower)
        else:
            graft(blocks[index], PassingBlock)
    carry_grid(tower, family, config)
    if not family.checkpoints_calls:  # timm gives no attention maps
        collector = collector_of(model or tower, tower)
        if family.stages or family.in_units:  # of each stage, the map of its last block, in Hiera unit by unit
            without = tuple(n for n, stage in enumerate(stages) if stage.blocks[-1] in phis)
            fill_attentions(collector, stages, without, (5,) if family.in_units else (4,), exactly=True)
        else:
            fill_attentions(collector, blocks, config.skip, (3, 4) if family.maps else (4,))
    tower.__dict__[RECORD] = Record(family, config, removed if keep_removed else None)
    for index, width in config.mlp_widths.items():
        narrow_block(tower, index, torch.arange(width))


def narrow_block(tower: nn.Module, index: int, kept: Tensor) -> None:
    """Keep some hidden units (n,) of the MLP of a block of a cut tower, by their numbers."""
    record: Record = tower.__dict__[RECORD]
    block = record.family.block_list(tower)[index]
    mlp = Mlp.of(tower, record.family, index)
    full = record.full_widths.get(index, mlp.width(block))
    before = mlp.keep(block, kept)
    removed = record.removed
    if removed is not None:
        removed = {**removed, index: {**before, **removed.get(index, {})}}  # the first that were taken out return
    tower.__dict__[RECORD] = replace(
        record,
        config=replace(record.config, mlp_widths={**record.config.mlp_widths, index: len(kept)}),
        removed=removed,
        full_widths={**record.full_widths, index: full},
    )


def with_widths(config: SkipatConfig, model: nn.Module) -> SkipatConfig:
    """The configuration of a model with the hidden widths that its cut towers have by now."""
    records = {record.config.tower: record for _, _, record in records_of(model)}

    def told(part: SkipatConfig) -> SkipatConfig:
        record = records.get(part.tower) or next(iter(records.values()))
        return replace(part, mlp_widths=record.config.mlp_widths)

    return replace(told(config), others=tuple(map(told, config.others)))


def reached(stages: Iterable[Stage], config: SkipatConfig) -> list[int]:
    """The blocks that the cut reaches: of each stage those up to its last that is skipped."""
    last = [max((index for index in stage.blocks if index in config.phi), default=-1) for stage in stages]
    return [index for stage, end in zip(stages, last, strict=True) for index in stage.blocks if index <= end]


def restore_tower(tower: nn.Module) -> None:
    """Undo `apply_to_tower`: what was taken out returns, moved to the tower's present device, dtype and mode.

    Raises:
        ValueError: The originals are not there.
    """
    check_restorable(tower)
    record: Record = tower.__dict__[RECORD]
    family = record.family
    assert record.removed is not None
    blocks = family.block_list(tower)
    for index, slots in record.removed.items():
        block = blocks[index]
        for slot, module in slots.items():
            put(block, slot, module if module is None else _like(module, block))
        if index in record.config.phi:
            del block.phi, block.skipat_feeds_next
    for index in reached(family.stage_list(tower), record.config):
        undo_save_memory(blocks[index])
        for slot in filter(None, (family.norm, family.attention)):
            module = blocks[index].get_submodule(slot)
            ungraft(module)
            module.__dict__.pop("skipat_family", None)
            module.__dict__.pop("skipat_units", None)
        if family.maps and not family.stages:
            undo_windows(blocks[index], blocks[index].get_submodule(family.attention))
        elif family.folded:
            undo_keep_windows_apart(blocks[index], family)
        ungraft(blocks[index])
        undo_no_windows(blocks[index])
    drop_grid(tower, family)
    del tower.__dict__[RECORD]


def check_restorable(tower: nn.Module) -> None:
    """Check that what was taken out of a cut tower is still there.

    Raises:
        ValueError: It is not.
    """
    if tower.__dict__[RECORD].removed is None:
        raise ValueError(
            "the attention that was taken out is not there: the model was loaded from a cut checkpoint, cut with "
            "keep_removed=False, or told to forget it; load the model that it was made from instead"
        )


def forget_removed(tower: nn.Module) -> None:
    """Let go of what was taken out of a cut tower."""
    tower.__dict__[RECORD] = replace(tower.__dict__[RECORD], removed=None)


def take_out(
    block: nn.Module, family: Family, stand_in: nn.Module, keep_norm: bool = False
) -> dict[str, nn.Module | None]:
    """Take the MSA of a block out, with the norm before it and all that only it uses; returns them by slot.

    Args:
        block: Attended.
        family: Of its tower.
        stand_in: What takes the slot of the MSA.
        keep_norm: Leave the norm where it is.
    """
    slots = {family.attention: stand_in, **dict.fromkeys(family.drop)}
    if family.norm is not None and not keep_norm:
        slots[family.norm] = nn.Identity()
    removed = {slot: attrgetter(slot)(block) for slot in slots}
    for slot, module in slots.items():
        put(block, slot, module)
    return removed


def _skip(block: nn.Module, family: Family, phi: Phi, stage: Stage) -> dict[str, nn.Module | None]:
    """Put Φ into a block and return what was taken out, by slot: nothing where a part of the MSA is kept."""
    removed: dict[str, nn.Module | None] = {}
    within = family.in_units and attends_in_units(block, family)
    lay_out_no_windows(block, family)
    if family.channels_first and not family.stages:
        graft(block, ChannelsFirstBlock)
    if phi.keeps_msa:
        attention = block.get_submodule(family.attention)
        graft(attention, KeptAttention)
        attention.__dict__["skipat_family"] = family
    else:
        removed = take_out(block, family, SkippedAttention(family.returns_tuple), keep_norm=phi.reads_x)
    if stage.units:
        put_units_aside(block, family, stage.units, within)
    _box_norm(block, family)
    graft(block, SkippedBlock)
    save_memory(block, family.attention)
    block.phi = phi
    return removed


def lay_out_no_windows(block: nn.Module, family: Family) -> None:
    """Have a block whose MSA is taken out leave its map, or its windows, as they are."""
    if family.stages:
        graft(block, family.stages.skipped)
    elif family.maps:
        drop_windows(block)
    elif family.folded:
        keep_windows_apart(block, family)


def _tap(block: nn.Module, family: Family, tower: nn.Module) -> None:
    """Let an attended block hand its Z on."""
    if family.channels_first and not family.stages:
        graft(block, ChannelsFirstBlock)
    if family.stages:
        graft(block, family.stages.attended)
    graft(block, FeedingBlock)
    save_memory(block, family.attention)
    if not family.stages:
        attention = block.get_submodule(family.attention)
        if family.maps:
            move_windows(block, attention)
        elif family.folded:
            join_in_attention(block, family, tower)
        graft(attention, TappedAttention)
        attention.__dict__["skipat_family"] = family
    _box_norm(block, family)


def _box_norm(block: nn.Module, family: Family) -> None:
    """Let the norm before an MSA, or what took its slot, hand the box on."""
    if family.norm is not None:
        graft(block.get_submodule(family.norm), BoxedNorm)


def _like(module: nn.Module, block: nn.Module) -> nn.Module:
    """The module on the device of a block, in its dtype and mode."""
    # On the meta device, some hosts make a parameter on the CPU all the same.
    parameter = max(block.parameters(), key=lambda parameter: parameter.is_meta)
    return module.to(parameter.device, parameter.dtype).train(block.training)
