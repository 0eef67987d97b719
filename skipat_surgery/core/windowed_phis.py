"""Which Φ a block can have where windows come in.

One that attends within windows has one without clusters: its MSA costs little, and has not learned to attend over
clusters of the whole map. Where windows are folded into the batch, a global block has one that keeps nothing of its
MSA, which attends over several windows, while Φ sees one.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from .config import PhiConfig, SkipatConfig
from .family import Family
from .folded_carrying import attends_globally
from .map_carrying import attends_in_windows
from .unit_carrying import attends_in_units


def is_windowed(family: Family, block: nn.Module) -> bool:
    """Whether a block that is not cut attends within windows, or units."""
    if family.folded:
        return not attends_globally(block, family)
    if family.in_units:
        return attends_in_units(block, family)
    return family.stages is not None or (family.maps and attends_in_windows(block))


def check_windowed(family: Family, block: nn.Module, index: int, phi: PhiConfig, special: int) -> None:
    """Check that the Φ of a block keeps nothing of its MSA that does not fit windows.

    Args:
        family: Of the tower.
        block: Not cut yet.
        index: Its number.
        phi: For it.
        special: How many tokens of the tower are no patches.

    Raises:
        ValueError: It does.
    """
    if family.folded and attends_globally(block, family) and (phi.pool or (special and phi.prefix == "attend")):
        raise ValueError(
            f"block {index} attends over all windows of an image, and a Φ sees them one by one: give it one that "
            f"keeps nothing of its MSA, such as {{{index}: PhiConfig(prefix='mix', pool=0)}}"
        )
    if phi.pool and is_windowed(family, block):
        others = "" if family.stages or family.folded else ", or skip global blocks alone"
        raise ValueError(
            f"block {index} attends within windows, which costs little, and its MSA has not learned to attend over "
            f"clusters of the whole map: give that block a Φ without clusters, such as {{{index}: "
            f"PhiConfig(pool=0)}}{others}"
        )


def suited(tower: nn.Module, family: Family, config: SkipatConfig) -> SkipatConfig:
    """The same without what does not fit blocks that attend within windows, or windows that are folded."""
    blocks = family.block_list(tower)

    def fitted(index: int, phi: PhiConfig) -> PhiConfig:
        block = blocks[index] if index < len(blocks) else None
        joins = block is not None and family.folded is not None and attends_globally(block, family)
        if block is None or not (joins or is_windowed(family, block)):
            return phi
        phi = replace(phi, pool=0, queries="clusters")
        return replace(phi, prefix="mix") if joins else phi

    return replace(config, phi={index: fitted(index, phi) for index, phi in config.phi.items()})
