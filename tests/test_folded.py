"""Windows that a host folds into the batch: Φ sees each as an image, and everything else whole images."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import case_named
from models import assert_same, cut_of
from torch import Tensor, nn

import skipat_surgery
from skipat_surgery import Evaluator, PhiConfig
from skipat_surgery.convert.states import Walk
from skipat_surgery.core.folded_windows import tokens_of_images
from skipat_surgery.observing import outputs_of, z_of
from skipat_surgery.tower import Tower

BACKBONES = ("RfDetrDinov2Backbone", "LwDetrViTBackbone")
SKIP = [1, 2, 3, 5]  # block 2 attends to all windows of an image, and so does block 4
every_backbone = pytest.mark.parametrize("name", BACKBONES)
every_model = pytest.mark.parametrize("name", [*BACKBONES, "RfDetrForObjectDetection", "LwDetrForObjectDetection"])


def batches(count: int = 4, of: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(of, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_windows_become_images_with_each_patch_in_its_place() -> None:
    rows, columns = torch.arange(4.0), torch.arange(6.0)
    image = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)  # of 2 × 2 windows of 2 × 3 patches
    windows = [image[top : top + 2, left : left + 3].reshape(6, 2) for top in (0, 2) for left in (0, 3)]
    special = torch.full((1, 2), -1.0)
    folded = torch.stack([torch.cat([special - number, window]) for number, window in enumerate(windows)])
    found = tokens_of_images(torch.cat([folded, folded + 10]), 2, (2, 3), 1)
    expected = torch.cat([torch.cat([special - number for number in range(4)]), image.reshape(24, 2)])
    assert torch.equal(found, torch.stack([expected, expected + 10]))


@every_backbone
@torch.no_grad()
def test_z_is_by_window_in_blocks_of_both_kinds_in_an_untouched_tower_and_in_a_cut_one(name: str) -> None:
    stock, images = case_named(name).model(), batches(1)[0]
    tower, given = Tower.of(stock), {}
    prefix = tower.num_special_in_blocks

    def keep(index: int, output: tuple[Tensor, ...]) -> None:
        given[index] = output[0]

    for index, block in enumerate(tower.blocks):
        block.attention.register_forward_hook(lambda module, args, output, index=index: keep(index, output))
    found = z_of(tower, [0, 2, 4], images)
    assert given[0].shape == found[0].shape == found[2].shape == (32, prefix + 16, 16)
    assert given[2].shape == (8, 4 * (prefix + 16), 16)
    assert_same(found, {index: given[index].reshape(32, prefix + 16, 16) for index in found}, atol=0, rtol=0)
    cut = Tower.of(cut_of(stock, [3]))
    assert_same(z_of(cut, [0, 2], images), {index: found[index] for index in (0, 2)})


@every_backbone
@torch.no_grad()
def test_tokens_that_are_compared_are_those_of_whole_images(name: str) -> None:
    """As the host itself lays the patches out for its last feature map."""
    stock, images = case_named(name).model(), batches(1)[0]
    tower, found = Tower.of(stock), outputs_of(stock, Tower.of(stock), images)
    assert found.tokens.shape[:2] == (8, tower.num_special_tokens + 64)
    patches = found.tokens[:, tower.num_special_tokens :]
    torch.testing.assert_close(patches, stock(images).feature_maps[-1].flatten(2).mT.float())


@every_model
def test_it_is_solved_refitted_aligned_and_distilled(name: str) -> None:
    stock = case_named(name).model()
    cut = skipat_surgery.apply(copy.deepcopy(stock), SKIP)
    data = batches()
    solved = skipat_surgery.solve(cut, stock, data, progress=False)
    assert (solved.images, set(solved.patches)) == (32, set(SKIP))
    assert all(error < 1 for error in solved.patches.values())
    refitted = skipat_surgery.refit(cut, stock, data, progress=False)
    assert (refitted.images, list(refitted.after)) == ((24, 8), [1, 2, 3, 4, 5])
    assert all(refitted.after[index] <= refitted.before[index] for index in refitted.after)
    assert skipat_surgery.align(cut, stock, data, steps=2, progress=False).steps == 2
    student, teacher = cut.float(), stock.float()
    result = skipat_surgery.distill(student, teacher, [batch.float() for batch in data], steps=2, progress=False)
    assert len(result.losses) == 2
    figures = Evaluator(teacher)(student, [batch.float() for batch in data])
    assert figures["images"] == 32
    assert 0.5 < figures["patch_cosine"] < 1


@every_backbone
@torch.no_grad()
def test_a_walk_over_the_blocks_is_the_models_own_forward(name: str) -> None:
    cut = cut_of(case_named(name).model(), SKIP)
    tower, images, inputs = Tower.of(cut), batches(1)[0], []
    for block in tower.blocks:
        block.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    cut(images)
    walk = Walk(tower, 1)
    walk.start(images)
    assert walk.images == 8
    for index in range(1, 6):
        torch.testing.assert_close(walk.states[0].x, inputs[index], atol=1e-12, rtol=0)
        assert walk.states[0].grid == (4, 4)
        walk.move_on()


@every_backbone
def test_a_global_msa_is_refitted(name: str) -> None:
    """W_o, spoilt, is brought back: what it reads are all windows of an image, what it is fitted to each by itself."""
    stock = case_named(name).model()
    cut = skipat_surgery.apply(copy.deepcopy(stock), [1])
    skipat_surgery.solve(cut, stock, batches(), progress=False)
    spoilt, right = (Tower.of(model).blocks[2].attention.o_proj for model in (cut, stock))
    spoilt.weight.data += torch.randn_like(spoilt.weight)
    before = (spoilt.weight - right.weight).norm()
    skipat_surgery.refit(cut, stock, batches(), progress=False)
    assert (spoilt.weight - right.weight).norm() < 0.5 * before


def test_a_global_block_keeps_nothing_of_its_msa_and_others_their_prefix() -> None:
    model = case_named("RfDetrDinov2Backbone").model()
    cut = skipat_surgery.apply(model, SKIP)
    assert {i: config.prefix for i, config in Tower.of(cut).config.phi.items()} == {
        1: "attend",
        2: "mix",
        3: "attend",
        5: "attend",
    }
    assert not any(config.pool for config in Tower.of(cut).config.phi.values())


@pytest.mark.parametrize(
    ("phi", "match"),
    [
        (
            {2: PhiConfig(pool=0)},
            r"block 2 attends over all windows.*\{2: PhiConfig\(prefix='mix', pool=0\)",
        ),
        ({4: PhiConfig(prefix="mix")}, r"block 4 attends over all windows of an image"),
        ({1: PhiConfig()}, r"block 1 attends within windows.*\{1: PhiConfig\(pool=0\)\}$"),
    ],
)
def test_what_does_not_fit_is_refused(phi: dict[int, PhiConfig], match: str) -> None:
    model = case_named("RfDetrDinov2Backbone").model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=match):
        skipat_surgery.apply(model, phi)
    assert_same(model.state_dict(), before, atol=0, rtol=0)
    assert [block.global_attention for block in model.encoder.layer] == [False, False, True, False, True, False]


@every_backbone
def test_blocks_know_again_how_they_attend_after_restore(name: str) -> None:
    def kinds(model: nn.Module) -> list[bool]:
        flag = "global_attention" if name.startswith("Rf") else "window"
        return [getattr(block, flag) for block in model.encoder.layer]

    model, images = case_named(name).model(), batches(1)[0]
    before, expected = kinds(model), case_named(name).tensors(model, images)
    cut = skipat_surgery.apply(model, [3, 4])
    assert kinds(cut) != before
    skipat_surgery.restore(cut)
    assert kinds(model) == before
    assert not model._forward_pre_hooks
    assert_same(case_named(name).tensors(model, images), expected, atol=0, rtol=0)


@every_backbone
def test_the_report_is_of_whole_images(name: str) -> None:
    report = skipat_surgery.report(skipat_surgery.apply(case_named(name).model(), SKIP))
    assert report.towers[0].grid == (8, 8)
    assert "8×8 patches; MACs for one image" in str(report)
    assert "blocks 2, 4 attend to the whole image, the others within windows of it" in str(report)


def test_plans_and_token_merging_are_refused() -> None:
    model = case_named("LwDetrViTBackbone").model()
    with pytest.raises(ValueError, match=r"\[0, 1, 3, 5\] attend within windows.*apply\(model, skip=\[2, 4\]\)"):
        skipat_surgery.plan(model, batches(), n_skip=1, progress=False)
