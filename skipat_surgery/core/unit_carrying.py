"""What towers need on top of `carrying` whose tokens lie in units: Φ, and what is kept of an MSA, see them on the map.

Between blocks they lie in units, and so does a Z that is handed on.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .carrying import RunsPhi, box_of, with_box
from .family import Family
from .grafting import Grafted, graft
from .units import Units

_WITHIN = "use_mask_unit_attn"  # of an MSA of transformers or timm, whether it attends within units


class UnitsAside(Grafted):
    """What stands in the slot of a skipped block's MSA: it is given the tokens and Z row by row, and gives Z so."""

    skipat_units: Units

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        units, box = self.skipat_units, box_of(x)
        grid: Any = box.grid
        box.z = units.tokens(box.empty(), grid)
        if box.phi.reads_x or box.phi.keeps_msa:  # else they are not looked at
            x = with_box(units.tokens(x, grid), box)
        out = super().__call__(x, *args, **kwargs)  # type: ignore[misc]
        z = box.z = units.put_back(box.empty(), grid)
        return (z, *out[1:]) if isinstance(out, tuple) else z


def attends_in_units(block: nn.Module, family: Family) -> bool:
    """Whether the MSA of a block attends within units, or did before it was taken out."""
    return getattr(block.get_submodule(family.attention), _WITHIN)


def put_units_aside(block: nn.Module, family: Family, units: Units, within: bool) -> None:
    """Have what runs Φ in a block see the map. After any other graft on it; it remembers whether the MSA attended
    within units."""
    stand_in = block.get_submodule(family.attention)
    assert isinstance(stand_in, RunsPhi)
    graft(stand_in, UnitsAside)
    stand_in.__dict__["skipat_units"] = units
    stand_in.__dict__[_WITHIN] = within
