"""The operation itself, on a tower: take the MSA of chosen blocks out, put Φ in, and put everything back."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from .attention_maps import fill_attentions, unfill_attentions
from .carrying import (
    BoxedNorm,
    Carrier,
    FeedingBlock,
    GridSource,
    PassingBlock,
    SkippedAttention,
    SkippedBlock,
    TappedAttention,
)
from .config import SkipatConfig
from .family import Family
from .grafting import graft, ungraft
from .in_place import save_memory, undo_save_memory
from .kept_attention import KeptAttention
from .phi import Phi
from .timm_carrying import move_checkpointing_into_blocks, set_out_grid, undo_timm_layers
from .transformers_carrying import AddingEncoder

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


def check_skip(config: SkipatConfig, num_blocks: int, what: str) -> None:
    """Check the skipped blocks against a model's depth.

    Raises:
        ValueError: None is skipped, block 0 is, or an index is out of range.
    """
    if not config.skip:
        raise ValueError("skip is empty: name at least one block to skip, such as range(3, 9)")
    outside = [index for index in config.skip if not 0 <= index < num_blocks]
    if outside:
        raise ValueError(
            f"skip names {outside}, but {what} has {num_blocks} blocks; allowed are 1 to {num_blocks - 1}, counted "
            "from 0"
        )
    if 0 in config.skip:
        raise ValueError(
            "block 0 cannot be skipped: no block before it gives a Z to start from; allowed are 1 to "
            f"{num_blocks - 1}, counted from 0"
        )


def check_kept(tower: nn.Module, family: Family, config: SkipatConfig) -> None:
    """Check that the MSAs of which a part is kept can be taken apart.

    Raises:
        ValueError: One is of a kind that cannot.
    """
    special = family.num_prefix_tokens(tower) + family.num_suffix_tokens(tower)
    for index, phi in config.phi.items():
        attention = family.block_list(tower)[index].get_submodule(family.attention)
        if (phi.pool or (phi.prefix == "attend" and special)) and not family.attends(attention):
            raise ValueError(
                f"no part of the MSA of block {index} can be kept, as its {type(attention).__name__} is of no kind "
                "that is known: pass PhiConfig(prefix='mix', pool=0), or PhiConfig.paper()"
            )


def apply_to_tower(tower: nn.Module, family: Family, config: SkipatConfig, *, keep_removed: bool) -> None:
    """Cut a tower in place. Everything has been checked before.

    Args:
        tower: Of this family, untouched.
        family: Its entry.
        config: The blocks to skip, each with its Φ.
        keep_removed: Keep what is taken out, so that `restore_tower` can put it back.
    """
    blocks = family.block_list(tower)
    width, prefix, suffix = family.width(tower), family.num_prefix_tokens(tower), family.num_suffix_tokens(tower)
    phis = {index: Phi(width, prefix, phi, suffix) for index, phi in config.phi.items()}
    for index, phi in phis.items():
        _like(phi, blocks[index])
    if family.embeddings is None:
        move_checkpointing_into_blocks(tower, family)
    removed = {i: _skip(blocks[i], family, phi) for i, phi in phis.items()}
    for index in range(max(phis) + 1):
        feeds_next = index + 1 in phis
        if index in phis:
            blocks[index].skipat_feeds_next = feeds_next  # type: ignore[assignment]
        elif feeds_next:
            _tap(blocks[index], family)
        else:
            graft(blocks[index], PassingBlock)
    _carry_grid(tower, family)
    if family.embeddings is not None:
        fill_attentions(tower, family, config.skip)
    tower.__dict__[RECORD] = Record(family, config, removed if keep_removed else None)


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
            setattr(block, slot, module if module is None else _like(module, block))
        del block.phi, block.skipat_feeds_next
    for index in range(max(record.removed) + 1):
        undo_save_memory(blocks[index])
        for slot in filter(None, (family.norm, family.attention)):
            module = blocks[index].get_submodule(slot)
            ungraft(module)
            module.__dict__.pop("skipat_family", None)
        ungraft(blocks[index])
    _drop_grid(tower, family)
    unfill_attentions(tower)
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
    removed = {slot: getattr(block, slot) for slot in slots}
    for slot, module in slots.items():
        setattr(block, slot, module)
    return removed


def _skip(block: nn.Module, family: Family, phi: Phi) -> dict[str, nn.Module | None]:
    """Put Φ into a block and return what was taken out, by slot: nothing where a part of the MSA is kept."""
    removed: dict[str, nn.Module | None] = {}
    if phi.keeps_msa:
        attention = block.get_submodule(family.attention)
        graft(attention, KeptAttention)
        attention.__dict__["skipat_family"] = family
    else:
        removed = take_out(block, family, SkippedAttention(family.returns_tuple), keep_norm=phi.reads_x)
    if phi.keeps_msa or phi.reads_x:
        _box_norm(block, family)
    graft(block, SkippedBlock)
    save_memory(block, family.attention)
    block.phi = phi
    return removed


def _tap(block: nn.Module, family: Family) -> None:
    """Let an attended block hand its Z on."""
    graft(block, FeedingBlock)
    save_memory(block, family.attention)
    graft(block.get_submodule(family.attention), TappedAttention)
    _box_norm(block, family)


def _box_norm(block: nn.Module, family: Family) -> None:
    """Let the norm before an MSA, where there is one, hand the box on."""
    if family.norm is not None:
        graft(block.get_submodule(family.norm), BoxedNorm)


def _carry_grid(tower: nn.Module, family: Family) -> None:
    """Let the patch grid travel from the images to the blocks."""
    for path in family.carriers:
        carrier = tower.get_submodule(path)
        if not isinstance(carrier, nn.Identity):  # which returns the very tensor it is given
            graft(carrier, Carrier)
    encoder = _adding_encoder(tower, family)
    if encoder is not None:
        graft(encoder, AddingEncoder)
    if family.embeddings is None:
        set_out_grid(tower, family)
    else:
        source = tower.get_submodule(family.embeddings)
        graft(source, GridSource)
        source.__dict__["skipat_family"] = family


def _adding_encoder(tower: nn.Module, family: Family) -> nn.Module | None:
    """The encoder that adds position embeddings between its blocks, where this tower has one."""
    encoder = None if family.adds_between is None else tower.get_submodule(family.adds_between)
    return encoder if getattr(encoder, "interpolation", None) is not None else None


def _drop_grid(tower: nn.Module, family: Family) -> None:
    """Undo `_carry_grid`."""
    for path in filter(None, (*family.carriers, family.adds_between)):
        ungraft(tower.get_submodule(path))
    if family.embeddings is None:
        undo_timm_layers(tower, family)
    else:
        source = tower.get_submodule(family.embeddings)
        ungraft(source)
        del source.__dict__["skipat_family"]


def _like(module: nn.Module, block: nn.Module) -> nn.Module:
    """The module on the device of a block, in its dtype and mode."""
    parameter = next(block.parameters())
    return module.to(parameter.device, parameter.dtype).train(block.training)
