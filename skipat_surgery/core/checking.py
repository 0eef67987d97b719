"""Whether a tower can be cut as it is asked for, before anything is changed."""

from __future__ import annotations

from torch import nn

from .config import SkipatConfig
from .family import Family
from .mlp import Mlp
from .stages import allowed_blocks
from .windowed_phis import check_windowed


def check_cut(tower: nn.Module, family: Family, config: SkipatConfig, what: str) -> None:
    """Check that a tower can be cut so: the blocks, and each Φ.

    Raises:
        ValueError: It cannot.
    """
    check_skip(tower, family, config, what)
    check_phis(tower, family, config)
    check_widths(tower, family, config)


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


def check_widths(tower: nn.Module, family: Family, config: SkipatConfig) -> None:
    """Check the hidden widths of MLPs against what the blocks have.

    Raises:
        ValueError: There is no such block, its MLP cannot be narrower, or has fewer hidden units.
    """
    blocks = family.block_list(tower)
    for index, width in config.mlp_widths.items():
        if index >= len(blocks):
            raise ValueError(f"mlp_widths names block {index}; there are {len(blocks)}, counted from 0")
        full = Mlp.of(tower, family, index).width(blocks[index])
        if not 1 <= width <= full:
            raise ValueError(f"mlp_widths gives the MLP of block {index} {width} hidden units; allowed are 1 to {full}")
