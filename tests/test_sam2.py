"""SAM 2: maps that an MSA makes smaller where a stage begins, in blocks within windows and global.

Blocks 0 to 3 and 4 to 5 are stages; the MSA of block 4 makes the map smaller; blocks 2 and 5 are global.
"""

from __future__ import annotations

import copy

import pytest
import torch
from cases import case_named
from models import assert_same, cut_of
from torch import Tensor
from torch.nn import functional as F

import skipat_surgery
from skipat_surgery import PhiConfig
from skipat_surgery.convert.states import Walk
from skipat_surgery.measure.counting import count_macs, count_parameters
from skipat_surgery.observing import z_of
from skipat_surgery.tower import Tower


@torch.no_grad()
def test_z_is_what_a_block_adds_to_its_residual() -> None:
    case = case_named("Sam2HieraDetModel")
    stock, images = case.model(), case.images()
    given: list[Tensor] = []
    normed: list[Tensor] = []
    for block in stock.blocks:
        block.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        block.layer_norm2.register_forward_pre_hook(lambda module, args: normed.append(args[0]))
    stock(images)
    first = stock.blocks[4]
    smaller = F.max_pool2d(first.proj(first.layer_norm1(given[4])).movedim(-1, 1), 2).movedim(1, -1)
    residuals = {0: given[0], 2: given[2], 4: smaller, 5: given[5]}
    expected = {index: (normed[index] - x).flatten(1, 2) for index, x in residuals.items()}
    found = z_of(Tower.of(case.model()), [0, 2, 4, 5], images)
    assert {index: z.shape[1:] for index, z in found.items()} == {0: (64, 16), 2: (64, 16), 4: (16, 32), 5: (16, 32)}
    assert_same(found, expected, atol=1e-12, rtol=0)
    cut = Tower.of(cut_of(case.model(), [5]))
    assert_same(z_of(cut, [0, 4], images), {index: found[index] for index in (0, 4)})


@torch.no_grad()
def test_a_walk_goes_over_a_block_that_makes_the_map_smaller() -> None:
    case = case_named("Sam2HieraDetModel")
    cut, images, inputs = cut_of(case.model(), [1, 2, 5]), case.images(), []
    tower = Tower.of(cut)
    for block in tower.blocks:
        block.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    cut(images)
    walk = Walk(tower, 1)
    walk.start(images)
    for index in range(1, 6):
        torch.testing.assert_close(walk.states[0].x, inputs[index], atol=1e-12, rtol=0)
        assert walk.states[0].grid == case.grids(images)[index]
        walk.move_on()


def test_a_sam_2_is_solved_refitted_aligned_and_distilled() -> None:
    stock = case_named("Sam2HieraDetModel").model()
    cut = skipat_surgery.apply(copy.deepcopy(stock), [1, 2, 3, 5])
    assert {index: phi.pool for index, phi in Tower.of(cut).config.phi.items()} == {1: 0, 2: 2, 3: 0, 5: 2}
    draws = torch.Generator().manual_seed(0)
    data = [torch.randn(8, 3, 32, 32, generator=draws, dtype=torch.float64) for _ in range(8)]
    solved = skipat_surgery.solve(cut, stock, data, progress=False)
    assert all(error < 0.9 for error in solved.patches.values())
    spoilt, right = (model.blocks[4].attn.proj for model in (cut, stock))  # of the MSA that makes the map smaller
    spoilt.weight.data += torch.randn_like(spoilt.weight)
    before = (spoilt.weight - right.weight).norm()
    refitted = skipat_surgery.refit(cut, stock, data, progress=False)
    assert (spoilt.weight - right.weight).norm() < 0.5 * before
    assert all(refitted.after[index] <= refitted.before[index] for index in range(1, 6))
    assert skipat_surgery.align(cut, stock, data, steps=2, progress=False).steps == 2
    model, teacher = cut.float(), stock.float()
    assert len(skipat_surgery.distill(model, teacher, [x.float() for x in data], steps=2, progress=False).losses) == 2
    assert skipat_surgery.cka(model, [x.float() for x in data[:2]], progress=False).msa.shape == (6, 6)


@pytest.mark.parametrize(
    ("skip", "match"),
    [
        ([4], r"skip names \[4\], where a stage of Sam2HieraDetModel begins.*allowed are 1 to 3, 5, counted"),
        ({1: PhiConfig()}, r"block 1 attends within windows"),
    ],
)
def test_what_cannot_be_skipped_in_a_sam_2(skip: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        skipat_surgery.apply(case_named("Sam2HieraDetModel").model(), skip)


def test_the_stages_of_a_sam_2_leave_out_what_is_no_whole_patch() -> None:
    tower = Tower.of(case_named("Sam2HieraDetModel").model())
    assert [(stage.blocks, stage.width, stage.grid((9, 11))) for stage in tower.stages] == [
        (range(4), 16, (9, 11)),
        (range(4, 6), 32, (4, 5)),
    ]


def test_figures_are_those_of_the_untouched_tower_where_its_msa_is_not_there() -> None:
    stock = case_named("Sam2HieraDetModel").model()
    _, macs = count_macs(stock, Tower.of(stock).family)
    cut = skipat_surgery.apply(copy.deepcopy(stock), {3: PhiConfig(pool=0), 5: PhiConfig.paper()}, keep_removed=False)
    report = skipat_surgery.report(cut)
    assert [block.macs_before for block in report.blocks] == macs
    assert [block.parameters_before for block in report.blocks] == [count_parameters(block) for block in stock.blocks]
