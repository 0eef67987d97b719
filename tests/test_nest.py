"""NesT: all of a block lies in windows, and Z on the map."""

from __future__ import annotations

import pytest
import timm
import torch
from cases import Case, InStages
from cases.dual import of_nest
from cases.stages import STAGED
from models import assert_same, cut_of, equations
from reference import paper_equations, phi_weights
from torch import Tensor, nn

import skipat_surgery
from skipat_surgery import UnsupportedModelError
from skipat_surgery.observing import z_of
from skipat_surgery.tower import Tower

# Blocks 1 and 3 to 5 can be skipped; of 16, 4 and 1 windows of 2×2 patches, on grids of 8×8, 4×4 and 2×2.
DEPTHS = (2, 3, 1)
SHAPE = {"embed_dims": (16, 32, 64), "num_heads": (2, 4, 4), "depths": DEPTHS, "num_levels": 3}
THREE = Case(
    "three levels",
    "NesT (timm)",
    of_nest("small_nest", **SHAPE),
    InStages("levels.{}.transformer_encoder.{}.attn", DEPTHS),
    **STAGED,
)


@torch.no_grad()
@pytest.mark.parametrize("skip", [(1,), (3, 4), (1, 4)], ids=str)
def test_three_levels_are_cut_as_the_equations_say(skip: tuple[int, ...]) -> None:
    stock, images = THREE.model(), THREE.images()
    cut = cut_of(stock, skip)
    found = THREE.tensors(cut, images)
    with equations(THREE, stock, cut, images):
        assert_same(found, THREE.tensors(stock, images), atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_z_is_on_the_map_in_an_untouched_tower_and_in_a_cut_one() -> None:
    """As timm itself puts windows together."""
    stock, images = THREE.model(), THREE.images()
    expected: dict[int, Tensor] = {}
    for index in (0, 1, 3):
        stock.get_submodule(THREE.msa.format(index)).register_forward_hook(
            lambda module, args, z, index=index: expected.update(
                {index: timm.models.nest.deblockify(z, 2).flatten(1, 2)}
            )
        )
    stock(images)
    assert {index: z.shape[1:] for index, z in expected.items()} == {0: (64, 16), 1: (64, 16), 3: (16, 32)}
    before = dict(expected)
    assert_same(z_of(Tower.of(stock), [0, 1, 3], images), before)
    tower = Tower.of(cut_of(stock, [1]))
    assert_same(z_of(tower, [0], images), {0: before[0]})
    made: list[Tensor] = []
    tower.blocks[1].phi.register_forward_hook(lambda module, args, z: made.append(z))
    assert_same(z_of(tower, [1], images), {1: made[0]})


@torch.no_grad()
def test_the_official_weights_pad_as_tensorflow_does() -> None:
    """And are of fixed widths and depths: of NesT-T, blocks 1, 3 and 5 to 11 can be skipped."""
    stock = timm.create_model("nest_tiny_jx", img_size=32, num_classes=5).double().eval()
    cut, images, skip = cut_of(stock, [1, 6, 7]), THREE.images(), (1, 6, 7)
    assert Tower.of(cut).skippable == (1, 3, *range(5, 12))
    found = cut(images)
    weights = {index: phi_weights(Tower.of(cut).blocks[index]) for index in skip}
    msa, grids = InStages("levels.{}.transformer_encoder.{}.attn", (2, 2, 8)), [(8, 8)] * 2 + [(4, 4)] * 2
    with paper_equations(stock, msa, 12, weights, (8, 8), 0, grids=[*grids, *[(2, 2)] * 8]):
        torch.testing.assert_close(found, stock(images), atol=1e-10, rtol=1e-10)


def test_levels_that_do_not_double_their_width_are_refused() -> None:
    model: nn.Module = of_nest("small_nest", embed_dims=(16, 24))()
    with pytest.raises(UnsupportedModelError, match="each is twice as wide as the one before it"):
        skipat_surgery.apply(model, [1])
