"""Contract 1: a cut model computes the paper's equations, at every size that its host takes."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case
from models import assert_same, cut_of, equations

import skipat_surgery
from skipat_surgery import PhiConfig

pytestmark = [pytest.mark.contract("equations"), pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)]
RUNS = {"one run": range(2, 5), "two runs": [1, 2, 4], "to the last block": [3, 5]}
PHIS = (PhiConfig(), PhiConfig.paper(), PhiConfig(expansion=0.125, kernel_size=3, prefix="mix", queries="patches"))


@torch.no_grad()
def test_output_equals_the_papers_equations(case: Case) -> None:
    stock, images = case.model(), case.images()
    untouched = case.tensors(stock, images)
    for skip, phi in zip(RUNS.values(), PHIS, strict=True):
        cut = cut_of(stock, case.skippable(skip), phi)
        found = case.tensors(cut, images)
        with equations(case, stock, cut, images):
            assert_same(found, case.tensors(stock, images), atol=1e-10, rtol=1e-10)
        # The surgery is no idle operation.
        assert any((mine - theirs).abs().max() > 1e-6 for mine, theirs in zip(found, untouched, strict=True))


@torch.no_grad()
def test_phi_knows_the_true_grid_at_other_sizes(case: Case) -> None:
    if not case.others:
        pytest.skip("the host takes only its configured size")
    stock = case.model()
    cut = cut_of(stock, [2, 3])
    for size in case.others:
        images = case.images(size)
        with equations(case, stock, cut, images):
            assert_same(
                case.tensors(cut, images, **case.flags),
                case.tensors(stock, images, **case.flags),
                atol=1e-10,
                rtol=1e-10,
            )


@torch.no_grad()
def test_batch_of_one_and_of_none(case: Case) -> None:
    stock = case.model()
    cut = cut_of(stock)
    images = case.images()
    both = case.tensors(cut, images)
    for found, expected in zip(case.tensors(cut, images[:1]), both, strict=True):
        if found.shape[1:] == expected.shape[1:] and len(expected) == 2:  # CLIP's logits compare over the batch
            torch.testing.assert_close(found, expected[:1])
    try:
        expected = case.tensors(stock, images[:0])
    except Exception as error:
        pytest.skip(f"the stock model takes no empty batch either: {error}")
    assert [out.shape for out in case.tensors(cut, images[:0])] == [out.shape for out in expected]


def test_report_counts_every_block(case: Case) -> None:
    stock = case.model()
    cut = cut_of(stock, [2, 3, 5])
    report = skipat_surgery.report(cut)
    assert [block.index for block in report.blocks if block.source is not None] == [2, 3, 5]
    assert report.towers[0].grid == case.grid(case.images())
    towers = [model.get_submodule(report.towers[0].path) for model in (stock, cut)]
    counts = [sum(parameter.numel() for parameter in tower.parameters()) for tower in towers]
    assert [report.parameters_before, report.parameters_after] == counts
    assert report.macs_after < report.macs_before
    assert "⇒" in str(report)
