"""Which Φ a block that attends within windows can have: one without clusters.

Its MSA costs little, and has not learned to attend over clusters of the whole map.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from .config import PhiConfig, SkipatConfig
from .family import Family
from .map_carrying import attends_in_windows


def is_windowed(family: Family, block: nn.Module) -> bool:
    """Whether a block that is not cut attends within windows of a map."""
    return family.stages is not None or (family.maps and attends_in_windows(block))


def check_windowed(family: Family, block: nn.Module, index: int, phi: PhiConfig) -> None:
    """Check that the Φ of a block has no clusters where it attends within windows of a map.

    Raises:
        ValueError: It has.
    """
    if phi.pool and is_windowed(family, block):
        others = "" if family.stages else ", or skip global blocks alone"
        raise ValueError(
            f"block {index} attends within windows, which costs little, and its MSA has not learned to attend over "
            f"clusters of the whole map: give that block a Φ without clusters, such as {{{index}: "
            f"PhiConfig(pool=0)}}{others}"
        )


def suited(tower: nn.Module, family: Family, config: SkipatConfig) -> SkipatConfig:
    """The same without clusters in blocks that attend within windows."""
    blocks = family.block_list(tower)
    windowed = {index for index in config.skip if index < len(blocks) and is_windowed(family, blocks[index])}
    phis = {
        index: replace(phi, pool=0, queries="clusters") if index in windowed else phi
        for index, phi in config.phi.items()
    }
    return replace(config, phi=phis)
