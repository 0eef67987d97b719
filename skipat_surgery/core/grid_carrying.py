"""How the patch grid of a tower comes to travel from the images to the blocks, by layout."""

from __future__ import annotations

from torch import nn

from .carrying import Carrier, Encoder, FirstBlock, FixedGrid, GridSource
from .config import SkipatConfig
from .family import Family, Grid
from .folded_carrying import bring_window_grid
from .grafting import graft, ungraft
from .map_carrying import FirstChannelsFirstBlock, FirstMapBlock, FirstPoolingBlock
from .packed_carrying import FirstPackedBlock, bring_grids, undo_bring_grids
from .timm_carrying import makes_the_grid, undo_move_checkpointing
from .transformers_carrying import AddingEncoder


def carry_grid(tower: nn.Module, family: Family, config: SkipatConfig) -> None:
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


def drop_grid(tower: nn.Module, family: Family) -> None:
    """Undo `carry_grid`, and let timm checkpoint by itself again."""
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
