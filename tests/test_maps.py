"""Towers of 2-D maps: blocks that attend within windows are skipped, and those around them, as global ones are."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import reference_maps
import torch
import transformers
from cases import case_named, maps
from models import assert_same, cut_of, equations, gradients, randomised
from torch import Tensor, nn

import skipat_surgery
from skipat_surgery import PhiConfig
from skipat_surgery.core.windows import Windows
from skipat_surgery.measure.counting import count_macs, count_parameters
from skipat_surgery.measure.limit import limit
from skipat_surgery.observing import z_of
from skipat_surgery.tower import Tower

GLOBAL = [2, 5]
NAMES = (
    "SamVisionModel",
    "SamHQVisionModel",
    "GotOcr2Model",
    "DeepseekOcr2VisionModel",
    "Sam3ViTModel",
    "timm samvit",
    "VitDetModel",
)
PHIS = {"reads x": PhiConfig(pool=0), "reads z": PhiConfig(pool=0, reads_x=False), "paper": PhiConfig.paper()}
every_tower = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def windowed() -> Iterator[None]:
    """Models are built with blocks 2 and 5 global and all others windowed, as SAM's 2, 5, 8 and 11 are."""
    before = maps.GLOBAL[:], maps.WINDOWED[:]
    maps.GLOBAL[:], maps.WINDOWED[:] = GLOBAL, [0, 1, 3, 4]
    yield
    maps.GLOBAL[:], maps.WINDOWED[:] = before


@pytest.fixture
def sam() -> nn.Module:
    return case_named("SamVisionModel").model()


def batches(count: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("grid", [(4, 4), (6, 3), (2, 7)])
def test_windows_are_those_of_the_reference_and_lead_back_to_the_map(grid: tuple[int, int]) -> None:
    x, laid = torch.randn(2, *grid, 5), Windows.square(3)
    windows = laid.partition(x)
    assert torch.equal(windows, reference_maps.like(x.flatten(1, 2), windows, grid))
    assert torch.equal(laid.unpartition(windows, grid), x)
    assert torch.equal(laid.tokens(windows.flatten(1, 2), grid), x.flatten(1, 2))


@every_tower
@torch.no_grad()
@pytest.mark.parametrize("phi", PHIS.values(), ids=PHIS.keys())
@pytest.mark.parametrize("skip", [(1, 2, 3), (1, 3, 4), (5,)], ids=str)
def test_windowed_blocks_are_skipped_by_the_papers_equations(name: str, phi: PhiConfig, skip: tuple[int, ...]) -> None:
    case = case_named(name)
    stock, images = case.model(), case.images()
    cut = cut_of(stock, skip, phi)
    found = case.tensors(cut, images)
    with equations(case, stock, cut, images):
        assert_same(found, case.tensors(stock, images), atol=1e-10, rtol=1e-10)


def test_other_sizes_have_other_windows() -> None:
    case = case_named("timm samvit")
    stock = case.model()
    cut = cut_of(stock, (1, 2, 4), PhiConfig.paper())
    for size in ((16, 64), (48, 40)):
        images = case.images(size)
        with equations(case, stock, cut, images):
            assert_same(case.tensors(cut, images), case.tensors(stock, images), atol=1e-10, rtol=1e-10)


@every_tower
def test_gradients_are_the_same_with_checkpointing(name: str) -> None:
    case = case_named(name)
    model = randomised(skipat_surgery.apply(case.model(), [1, 2, 4])).train()
    plain = gradients(case, model, case.images(), case.images(seed=1))
    if name == "Sam3ViTModel":
        pytest.skip("transformers does not offer it for this model")
    if case.is_timm:
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable()
    assert_same(gradients(case, model, case.images(), case.images(seed=1)), plain)
    assert any("phi" in key for key in plain)


@every_tower
@torch.no_grad()
def test_the_default_has_no_clusters_in_windows_and_is_restored_to_the_bit(name: str) -> None:
    case = case_named(name)
    model, images = case.model(), case.images()
    before = case.tensors(model, images)
    sides = [block.window_size for block in Tower.of(model).blocks]
    skipat_surgery.apply(model, range(1, 6))
    phis = Tower.of(model).config.phi
    assert {index: phi.pool for index, phi in phis.items()} == {1: 0, 2: 2, 3: 0, 4: 0, 5: 2}
    skipat_surgery.restore(model)
    assert [block.window_size for block in Tower.of(model).blocks] == sides
    assert_same(case.tensors(model, images), before, atol=0, rtol=0)


def test_clusters_in_windows_are_refused_before_anything_is_changed(sam: nn.Module) -> None:
    before = copy.deepcopy(sam.state_dict())
    with pytest.raises(ValueError, match=r"block 3 attends within windows.*\{3: PhiConfig\(pool=0\)\}.*global blocks"):
        skipat_surgery.apply(sam, [2, 3], PhiConfig())
    assert_same(sam.state_dict(), before, atol=0, rtol=0)
    skipat_surgery.apply(sam, {2: PhiConfig(), 3: PhiConfig(pool=0)})


def test_a_plan_names_the_global_blocks_to_choose_by_hand(sam: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1, 3, 4\] attend within windows.*apply\(model, skip=\[2, 5\]\)"):
        skipat_surgery.plan(sam, batches(), n_skip=1, progress=False)


@torch.no_grad()
def test_z_of_a_window_is_that_of_its_place_on_the_map(sam: nn.Module) -> None:
    """Of an untouched tower, whose MSA gives windows, and of a cut one, whose gives the map."""
    images = batches(1)[0]
    cut = skipat_surgery.apply(copy.deepcopy(sam), [2])
    mine, theirs = (z_of(Tower.of(model), [1], images)[1] for model in (cut, sam))
    assert mine.shape == (8, 16, 32)
    torch.testing.assert_close(mine, theirs)


def test_it_is_solved_refitted_and_aligned(sam: nn.Module) -> None:
    """A Φ as wide as the model takes a windowed MSA over well, as its values are made linear in its inputs here."""
    tower = Tower.of(sam)
    for block in tower.blocks:
        block.attn.qkv.weight.data[:64] = 0  # uniform attention, but for the relative positions
    cut = skipat_surgery.apply(copy.deepcopy(sam), [1, 2, 4], PhiConfig(pool=0, expansion=2))
    solved = skipat_surgery.solve(cut, sam, batches(), progress=False)
    assert set(solved.patches) == {1, 2, 4}
    assert all(error < 0.9 for error in solved.patches.values())
    refitted = skipat_surgery.refit(cut, sam, batches(), progress=False)
    assert set(refitted.after) == {1, 2, 3, 4, 5}
    assert all(refitted.after[index] <= refitted.before[index] for index in refitted.after)
    aligned = skipat_surgery.align(cut, sam, batches(), steps=3, progress=False)
    assert aligned.steps == 3


def test_a_windowed_msa_is_refitted(sam: nn.Module) -> None:
    """W_o of block 3, spoilt, is brought back: what it reads lies in windows, what it is fitted to on the map."""
    cut = skipat_surgery.apply(copy.deepcopy(sam), [1], PhiConfig(pool=0))
    skipat_surgery.solve(cut, sam, batches(), progress=False)
    spoilt = Tower.of(cut).blocks[3].attn.proj
    right = Tower.of(sam).blocks[3].attn.proj.weight
    spoilt.weight.data += torch.randn_like(spoilt.weight)
    before = (spoilt.weight - right).norm()
    refitted = skipat_surgery.refit(cut, sam, batches(), progress=False)
    assert refitted.after[3] < 0.5 * refitted.before[3]
    assert (spoilt.weight - right).norm() < 0.5 * before


def test_it_is_distilled_and_reported(sam: nn.Module) -> None:
    teacher, student = copy.deepcopy(sam).float(), skipat_surgery.apply(sam.float(), [1, 2, 5])
    images = [batch.float() for batch in batches(2)]
    result = skipat_surgery.distill(student, teacher, images, steps=2, progress=False)
    assert len(result.losses) == 2
    report = skipat_surgery.report(student)
    assert report.towers[0].grid == (4, 4)
    assert report.macs_after < report.macs_before
    assert skipat_surgery.cka(student, images, progress=False).msa.shape == (6, 6)


@torch.no_grad()
def test_the_limit_lays_out_no_windows(sam: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    without = limit(sam, [1, 2])
    block = without.vision_encoder.layers[1]
    monkeypatch.setattr(type(block), "window_partition", None)
    assert block(torch.randn(1, 4, 4, 32).double()).shape == (1, 4, 4, 32)


@torch.no_grad()
def test_attention_maps_have_none_where_a_block_is_skipped() -> None:
    config = transformers.SamVisionConfig(**maps.SAM, attn_implementation="eager")
    cut = skipat_surgery.apply(transformers.SamVisionModel(config).double().eval(), [2, 3])
    images = batches(1)[0]
    for return_dict in (True, False):
        out = cut(images, output_attentions=True, return_dict=return_dict)
        found = out.attentions if return_dict else out[-1]
        assert [index for index, map_ in enumerate(found) if map_ is None] == [2, 3]


@every_tower
def test_figures_are_those_of_the_untouched_tower_where_no_global_block_is_left(name: str) -> None:
    """Loaded cut as well, where what was taken out is not there."""
    case = case_named(name)
    stock = case.model()
    tower = Tower.of(stock)
    total, macs = count_macs(tower.module, tower.family)
    sizes = [count_parameters(block) for block in tower.blocks]
    for forgets in (False, True):
        cut = skipat_surgery.apply(copy.deepcopy(stock), {1: PhiConfig(pool=0), 2: PhiConfig(), 5: PhiConfig.paper()})
        report = skipat_surgery.report(skipat_surgery.forget(cut) if forgets else cut)
        assert [block.macs_before for block in report.blocks] == macs
        assert [block.parameters_before for block in report.blocks] == sizes
        assert report.macs_before == total
