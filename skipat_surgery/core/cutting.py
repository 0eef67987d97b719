"""The operation itself, on a tower: take the MSA of chosen blocks out, put Φ in, and put everything back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from operator import attrgetter

from torch import nn

from .attention_maps import collector_of, fill_attentions
from .carrying import (
    BoxedNorm,
    Carrier,
    Encoder,
    FeedingBlock,
    FirstBlock,
    FixedGrid,
    GridSource,
    PassingBlock,
    SkippedAttention,
    SkippedBlock,
    TappedAttention,
)
from .config import SkipatConfig
from .family import Family, Grid
from .folded_carrying import bring_window_grid, join_in_attention, keep_windows_apart, undo_keep_windows_apart
from .grafting import graft, ungraft
from .in_place import save_memory, undo_save_memory
from .kept_attention import KeptAttention
from .map_carrying import (
    ChannelsFirstBlock,
    FirstChannelsFirstBlock,
    FirstMapBlock,
    FirstPoolingBlock,
    drop_windows,
    move_windows,
    undo_windows,
)
from .packed_carrying import FirstPackedBlock, bring_grids, undo_bring_grids
from .phi import Phi
from .stage_carrying import undo_no_windows
from .stages import Stage, allowed_blocks
from .timm_carrying import makes_the_grid, move_checkpointing_into_blocks, undo_move_checkpointing
from .transformers_carrying import AddingEncoder
from .unit_carrying import attends_in_units, put_units_aside
from .windowed_phis import check_windowed

RECORD = "_skipat_record"


@dataclass(frozen=True)
class Record:
    """What was done to a tower. `removed` holds the modules taken out, by block and slot.

    The tower keeps it as a plain attribute: the removed modules are no submodules, so they are neither trained, saved
    nor moved. `removed` is None where the model was built cut, from a checkpoint.
    """

    family: Family
    config: SkipatConfig
    removed: dict[int, dict[str, nn.Module | None]] | None


def records_of(model: nn.Module) -> list[tuple[str, nn.Module, Record]]:
    """The cut towers in a model, as (path, tower, record)."""
    found = [(path, module, module.__dict__.get(RECORD)) for path, module in model.named_modules()]
    return [(path, module, record) for path, module, record in found if record is not None]


def check_cut(tower: nn.Module, family: Family, config: SkipatConfig, what: str) -> None:
    """Check that a tower can be cut so: the blocks, and each Φ.

    Raises:
        ValueError: It cannot.
    """
    check_skip(tower, family, config, what)
    check_phis(tower, family, config)


def check_skip(tower: nn.Module, family: Family, config: SkipatConfig, what: str) -> None:
    """Check the skipped blocks against a model's depth, its stages, and its last blocks that see further tokens.

    Raises:
        ValueError: None is skipped, block 0 is, an index is out of range, or one of those last blocks is skipped, or
            the first of a stage.
    """
    num_blocks, num_late = len(family.block_list(tower)), family.num_late_blocks(tower)
    stages = family.stage_list(tower)
    listed = allowed_blocks(stages) if len(stages) > 1 else f"1 to {num_blocks - num_late - 1}"
    allowed = f"allowed are {listed}, counted from 0"
    if not config.skip:
        raise ValueError("skip is empty: name at least one block to skip, such as range(3, 9)")
    outside = [index for index in config.skip if not 0 <= index < num_blocks]
    if outside:
        raise ValueError(f"skip names {outside}, but {what} has {num_blocks} blocks; {allowed}")
    if 0 in config.skip:
        raise ValueError(f"block 0 cannot be skipped: no block before it gives a Z to start from; {allowed}")
    first = [stage.blocks.start for stage in stages if stage.blocks.start in config.skip]
    if first:
        raise ValueError(
            f"skip names {first}, where a stage of {what} begins: the Z before has another grid and width, so that the "
            f"first block of a stage cannot be skipped; {allowed}"
        )
    late = [index for index in config.skip if index >= num_blocks - num_late]
    if late:
        raise ValueError(
            f"skip names {late}, but queries join the patches before the last {num_late} of the {num_blocks} blocks of "
            f"{what}, and no Z from before has those tokens; {allowed}"
        )


def check_phis(tower: nn.Module, family: Family, config: SkipatConfig) -> None:
    """Check that each Φ fits its tower: its kernel the axes of the grid, and the MSA what is kept of it.

    Raises:
        ValueError: One does not.
    """
    axes = len(family.grid(tower))
    special = family.num_prefix_tokens(tower) + family.num_suffix_tokens(tower)
    for index, phi in config.phi.items():
        phi.kernel(axes)
        block = family.block_list(tower)[index]
        check_windowed(family, block, index, phi, special)
        attention = block.get_submodule(family.attention)
        if (phi.pool or (phi.prefix == "attend" and special)) and not family.attends(attention):
            raise ValueError(
                f"no part of the MSA of block {index} can be kept, as its {type(attention).__name__} is of no kind "
                "that is known: pass PhiConfig(prefix='mix', pool=0), or PhiConfig.paper()"
            )


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
    _carry_grid(tower, family, config)
    if not family.checkpoints_calls:  # timm gives no attention maps
        collector = collector_of(model or tower, tower)
        if family.stages or family.in_units:  # of each stage, the map of its last block, in Hiera unit by unit
            without = tuple(n for n, stage in enumerate(stages) if stage.blocks[-1] in phis)
            fill_attentions(collector, stages, without, (5,) if family.in_units else (4,), exactly=True)
        else:
            fill_attentions(collector, blocks, config.skip, (3, 4) if family.maps else (4,))
    tower.__dict__[RECORD] = Record(family, config, removed if keep_removed else None)


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
            _put(block, slot, module if module is None else _like(module, block))
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
    _drop_grid(tower, family)
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
        _put(block, slot, module)
    return removed


def _put(block: nn.Module, slot: str, module: nn.Module | None) -> None:
    """Put a module, or None, into a slot of a block or of a part of it."""
    part, _, name = slot.rpartition(".")
    setattr(block.get_submodule(part), name, module)


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


def _carry_grid(tower: nn.Module, family: Family, config: SkipatConfig) -> None:
    """Let the patch grid travel from the images to the blocks."""
    for path in family.carriers:
        graft(tower.get_submodule(path), Carrier)
    adding = _adding_encoder(tower, family)
    if adding is not None:
        graft(adding, AddingEncoder)
    blocks = family.block_list(tower)
    if family.stages:
        for stage in family.stage_list(tower):
            if not config.phi.keys().isdisjoint(stage.blocks):
                graft(blocks[stage.blocks.start], family.stages.first)
        return
    first, encoders = blocks[0], _encoders(tower, family)
    if family.packs:
        bring_grids(tower, family, has_encoder=bool(encoders))
        if not encoders:
            graft(first, FirstPackedBlock)
    elif family.folded:
        bring_window_grid(tower, family)
    elif family.pooled:
        for stage in family.stage_list(tower):
            if not config.phi.keys().isdisjoint(stage.blocks):
                _start_stage(blocks[stage.blocks.start], family, stage.grid(family.grid(tower)))
    elif family.maps:
        graft(first, FirstChannelsFirstBlock if family.channels_first else FirstMapBlock)
        return
    elif family.embeddings is None and not makes_the_grid(tower, family):
        graft(first, FirstBlock)
        known = getattr(tower, "patch_embed", None)  # of timm, which may give it another size later
        first.__dict__["skipat_patches"] = (known if hasattr(known, "grid_size") else FixedGrid(family.grid(tower)),)
        return
    for encoder in encoders:
        graft(encoder, Encoder)
    if family.embeddings is not None:
        source = tower.get_submodule(family.embeddings)
        graft(source, GridSource)
        source.__dict__["skipat_family"] = family


def _start_stage(block: nn.Module, family: Family, grid: Grid) -> None:
    """Have the first block of a stage set the grid out: from the map that it is given, or the one that there can be."""
    if family.maps:
        graft(block, FirstPoolingBlock)
        return
    graft(block, FirstBlock)
    block.__dict__["skipat_patches"] = (FixedGrid(grid),)


def _encoders(tower: nn.Module, family: Family) -> list[nn.Module]:
    """The modules through which the tower runs its blocks, on what its embeddings gave."""
    if family.stages or family.pooled:  # whose first blocks know the grid by themselves
        return []
    path = family.blocks.split(".")
    owners = [".".join(path[: end + 1]) for end in range(len(path))]
    inner = [owner for owner in owners if not f"{family.embeddings}.".startswith(f"{owner}.")]
    modules = [tower.get_submodule(owner) for owner in inner]
    return [module for module in modules if not isinstance(module, nn.ModuleList)]  # which has no forward


def _adding_encoder(tower: nn.Module, family: Family) -> nn.Module | None:
    """The encoder that adds position embeddings between its blocks, where this tower has one."""
    encoder = None if family.adds_between is None else tower.get_submodule(family.adds_between)
    return encoder if getattr(encoder, "interpolation", None) is not None else None


def _drop_grid(tower: nn.Module, family: Family) -> None:
    """Undo `_carry_grid`."""
    for module in (*map(tower.get_submodule, family.carriers), *_encoders(tower, family)):
        ungraft(module)
    if family.checkpoints_calls:
        undo_move_checkpointing(tower, family)
    for stage in family.stage_list(tower):
        family.block_list(tower)[stage.blocks.start].__dict__.pop("skipat_patches", None)
    if family.packs or family.folded:
        undo_bring_grids(tower)
    if family.embeddings is not None:
        source = tower.get_submodule(family.embeddings)
        ungraft(source)
        del source.__dict__["skipat_family"]


def _like(module: nn.Module, block: nn.Module) -> nn.Module:
    """The module on the device of a block, in its dtype and mode."""
    # On the meta device, some hosts make a parameter on the CPU all the same.
    parameter = max(block.parameters(), key=lambda parameter: parameter.is_meta)
    return module.to(parameter.device, parameter.dtype).train(block.training)
