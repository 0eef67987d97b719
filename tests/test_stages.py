"""Stages: blocks are cut inside one of them, and Z lies on the map, whatever the shift of the windows."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import reference_stages
import timm
import torch
import transformers
from cases import Case, InStages, case_named
from cases.stages import BACKBONE, SHAPE, STAGED, SWIN, of_timm
from models import assert_same, cut_of, equations, gradients, randomised
from reference import paper_equations, phi_weights
from torch import Tensor, nn

import skipat_surgery
from skipat_surgery import PhiConfig
from skipat_surgery.convert.states import Walk
from skipat_surgery.core.windows import Windows
from skipat_surgery.measure.counting import count_macs, count_parameters
from skipat_surgery.measure.limit import limit
from skipat_surgery.measure.token_merging import check_merging
from skipat_surgery.observing import z_of
from skipat_surgery.tower import Tower

OF_TIMM = ("timm swin", "timm swin v2", "timm swin v2 cr")
of_timm_alone = pytest.mark.parametrize("name", OF_TIMM)
DUAL = ("timm davit", "timm davit with named blocks", "Florence2VisionBackbone")
SWINS = (*OF_TIMM, "SwinModel", "Swinv2Model", "DonutSwinModel", "Swin2SRModel")
every_tower = pytest.mark.parametrize("name", [*SWINS, *DUAL, "timm nest"])
# Blocks 1, 2 and 4 to 6 can be skipped; the grids are 9×11, 5×6 and 3×3, and windows of 3×3 are shifted by one.
DEPTHS = {"depths": (3, 4, 1), "num_heads": (2, 4, 4), "img_size": (36, 44)}
THREE = Case(
    "three stages",
    "Swin (timm)",
    of_timm("swin_tiny_patch4_window7_224", **DEPTHS),
    InStages("layers.{}.blocks.{}.attn", DEPTHS["depths"]),
    **{**STAGED, "size": (36, 44)},
)


GRIDS = [(8, 8)] * 4 + [(4, 4)] * 2  # of the blocks of the others


@pytest.fixture
def swin() -> nn.Module:
    return case_named("timm swin").model()


def batches(count: int = 8, of: int = 8, size: tuple[int, int] = (32, 32)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(of, 3, *size, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("sides", [(3, 3), (2, 4)], ids=str)
@pytest.mark.parametrize("shift", [(0, 0), (1, 1), (0, 2)], ids=str)
@pytest.mark.parametrize("grid", [(6, 8), (5, 7), (3, 3)], ids=str)
def test_shifted_windows_are_those_of_the_reference_and_lead_back_to_the_map(
    sides: tuple[int, int], shift: tuple[int, int], grid: tuple[int, int]
) -> None:
    x, laid = torch.randn(2, *grid, 5), Windows(sides, shift)
    windows = laid.partition(x)
    block: Any = type("Block", (), {"window_size": sides, "shift_size": shift})
    expected = reference_stages.like(x.flatten(1, 2), windows.flatten(1, 2), reference_stages.places(block, grid))
    assert torch.equal(windows.flatten(1, 2), expected)
    assert torch.equal(laid.unpartition(windows, grid), x)
    assert torch.equal(laid.tokens(windows.flatten(1, 2), grid), x.flatten(1, 2))


@torch.no_grad()
@pytest.mark.parametrize("skip", [(1, 2), (2, 4, 6), (4, 5, 6)], ids=str)
@pytest.mark.parametrize("phi", [None, PhiConfig.paper()], ids=["default", "paper"])
def test_odd_grids_and_a_stage_that_is_left_alone(skip: tuple[int, ...], phi: PhiConfig | None) -> None:
    stock, images = THREE.model(), THREE.images()
    cut = cut_of(stock, skip, phi or PhiConfig(pool=0))
    found = THREE.tensors(cut, images)
    weights = {index: phi_weights(Tower.of(cut).blocks[index]) for index in skip}
    with paper_equations(stock, THREE.msa, 8, weights, THREE.grid(images), 0, grids=THREE.grids(images)):
        assert_same(found, THREE.tensors(stock, images), atol=1e-10, rtol=1e-10)


@torch.no_grad()
@of_timm_alone
def test_z_is_on_the_map_in_an_untouched_tower_and_in_a_cut_one(name: str) -> None:
    """As the block's own way back from its windows gives it: block 1 shifts them."""
    case = case_named(name)
    stock, images = case.model(), case.images()
    seen: dict[int, Tensor] = {}
    tower = Tower.of(stock)
    way = "_attn" if hasattr(tower.blocks[0], "_attn") else "_shifted_window_attn"
    for index, block in enumerate(tower.blocks):
        own = getattr(block, way)
        setattr(block, way, lambda x, own=own, index=index: seen.setdefault(index, own(x)))
    stock(images)
    for block in tower.blocks:
        delattr(block, way)
    found = z_of(tower, [0, 1, 4], images)
    assert {index: z.shape[1:] for index, z in found.items()} == {0: (64, 16), 1: (64, 16), 4: (16, 32)}
    assert_same(found, {index: seen[index].flatten(1, 2) for index in found})
    cut = cut_of(stock, [2])
    assert_same(z_of(Tower.of(cut), [0, 1], images), {index: seen[index].flatten(1, 2) for index in (0, 1)})


def test_the_stages_and_what_can_be_skipped() -> None:
    tower = Tower.of(THREE.model())
    assert [(stage.blocks, stage.width, stage.grid((9, 11))) for stage in tower.stages] == [
        (range(3), 16, (9, 11)),
        (range(3, 7), 32, (5, 6)),
        (range(7, 8), 64, (3, 3)),
    ]
    assert tower.skippable == (1, 2, 4, 5, 6)
    sizes = [tower.module.layers[number].output_resolution for number in range(3)]
    assert [stage.grid(tower.grid(THREE.images())) for stage in tower.stages] == sizes
    whole = Tower.of(case_named("timm vit").model())
    assert [stage.blocks for stage in whole.stages] == [range(6)]


@pytest.mark.parametrize(
    ("skip", "match"),
    [
        ([3], r"skip names \[3\], where a stage of SwinTransformer begins: .* allowed are 1 to 2, 4 to 6, counted"),
        ([1, 3, 7], r"skip names \[3, 7\], where a stage"),
        ([0], r"block 0 cannot be skipped.*allowed are 1 to 2, 4 to 6"),
        ([9], r"skip names \[9\], but SwinTransformer has 8 blocks; allowed are 1 to 2, 4 to 6"),
        ({4: PhiConfig()}, r"block 4 attends within windows.*\{4: PhiConfig\(pool=0\)\}$"),
    ],
)
def test_what_cannot_be_skipped_is_refused_with_what_can(skip: Any, match: str) -> None:
    model = THREE.model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=match):
        skipat_surgery.apply(model, skip)
    assert_same(model.state_dict(), before, atol=0, rtol=0)


def test_a_plan_and_token_merging_are_refused(swin: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"has stages, .* choose by hand: apply\(model, skip=…\), where 1 to 3, 5 are"):
        skipat_surgery.plan(swin, batches(), n_skip=1, progress=False)
    with pytest.raises(ValueError, match="token merging is written for plain pre-norm blocks"):
        check_merging(swin, batches(1)[0])


def test_checkpointing_is_the_stages_own_again_after_restore() -> None:
    case = case_named("timm swin")
    model = case.model().train()
    model.set_grad_checkpointing()
    cut = skipat_surgery.apply(model, [1, 2, 5])
    assert not any(stage.grad_checkpointing for stage in cut.layers)
    images = case.images(), case.images(seed=1)
    checkpointed = gradients(case, randomised(cut), *images)
    cut.set_grad_checkpointing(False)
    assert_same(checkpointed, gradients(case, cut, *images))
    cut.set_grad_checkpointing()
    skipat_surgery.restore(cut)
    assert all(stage.grad_checkpointing for stage in cut.layers)


@every_tower
def test_it_is_solved_refitted_and_aligned_over_stages(name: str) -> None:
    case = case_named(name)
    stock = case.model()
    cut = skipat_surgery.apply(copy.deepcopy(stock), [1, 2, 5], PhiConfig(pool=0, expansion=1))
    data = batches(of=16, size=case.size)
    solved = skipat_surgery.solve(cut, stock, data, progress=False)
    assert set(solved.patches) == {1, 2, 5}
    assert all(error < 0.9 for error in solved.patches.values())
    refitted = skipat_surgery.refit(cut, stock, data, progress=False)
    assert list(refitted.after) == [1, 2, 3, 4, 5]
    assert all(refitted.after[index] <= refitted.before[index] for index in refitted.after)
    assert skipat_surgery.align(cut, stock, data, steps=3, progress=False).steps == 3


@every_tower
@torch.no_grad()
def test_a_walk_over_the_blocks_is_the_models_own_forward(name: str) -> None:
    """From stage to stage as well, of which the next takes what the last gave with its patches merged, or convolved."""
    case = case_named(name)
    cut = cut_of(case.model(), [1, 2, 5])
    tower, images, inputs = Tower.of(cut), case.images(), []
    for block in tower.blocks:
        block.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    cut(images)
    walk = Walk(tower, 1)
    walk.start(images)
    for index in range(1, 6):
        torch.testing.assert_close(walk.states[0].x, inputs[index], atol=1e-12, rtol=0)
        assert walk.states[0].grid == case.grids(images)[index]
        walk.move_on()


@pytest.mark.parametrize("index", [3, 4], ids=["shifted windows", "in the next stage"])
def test_a_windowed_msa_is_refitted(swin: nn.Module, index: int) -> None:
    """W_o, spoilt, is brought back: what it reads lies in windows, what it is fitted to on the map."""
    cut = skipat_surgery.apply(copy.deepcopy(swin), [1], PhiConfig(pool=0))
    skipat_surgery.solve(cut, swin, batches(), progress=False)
    spoilt, right = (Tower.of(model).blocks[index].attn.proj for model in (cut, swin))
    spoilt.weight.data += torch.randn_like(spoilt.weight)
    before = (spoilt.weight - right.weight).norm()
    skipat_surgery.refit(cut, swin, batches(), progress=False)
    assert (spoilt.weight - right.weight).norm() < 0.5 * before


@every_tower
def test_it_is_distilled_and_reported(name: str) -> None:
    case = case_named(name)
    model = case.model().float()
    teacher, student = copy.deepcopy(model), skipat_surgery.apply(model, [1, 2, 5])
    data = [batch.float() for batch in batches(2, size=case.size)]
    result = skipat_surgery.distill(student, teacher, data, steps=2, progress=False)
    assert len(result.losses) == 2
    report = skipat_surgery.report(student)
    assert report.towers[0].grid == (8, 8)
    assert json.loads(json.dumps(report.to_dict()))["towers"][0]["stages"][1]["blocks"] == [4, 5]
    last = "4×4 patches of width 32" if case.msa.halves else "8×8 patches of width 16"
    assert f"in stages: blocks 0-3 8×8 patches of width 16; blocks 4-5 {last}" in str(report)
    assert skipat_surgery.cka(student, data, progress=False).msa.shape == (6, 6)


def test_what_merges_patches_behind_the_cut_is_trained(swin: nn.Module) -> None:
    cut = skipat_surgery.apply(swin, [2])
    skipat_surgery.freeze_untouched(cut)
    trained = {name for name, parameter in cut.named_parameters() if parameter.requires_grad}
    assert "layers.1.downsample.reduction.weight" in trained
    assert not any(name.startswith("layers.0.blocks.1") for name in trained)


@every_tower
@torch.no_grad()
def test_the_limit_lays_out_no_windows(name: str) -> None:
    """Block 1 adds the MLP alone, and gives no window anything."""
    case = case_named(name)
    stock, images = case.model(), case.images()
    without, inputs = limit(stock, [1, 2, 5]), []
    Tower.of(without).blocks[1].register_forward_pre_hook(lambda module, args: inputs.append(args))
    Tower.of(without).msa_slot(1).register_forward_pre_hook(lambda module, args: inputs.append(args))
    found = case.tensors(without, images)
    assert [out.shape for out in found] == [out.shape for out in case.tensors(stock, images)]
    assert [len(x) for x, *_ in inputs] == [2, 2]
    assert inputs[1][0].numel() == inputs[0][0].numel()


@every_tower
def test_figures_are_those_of_the_untouched_tower(name: str) -> None:
    """Loaded cut as well, where what was taken out is not there."""
    stock = case_named(name).model()
    tower = Tower.of(stock)
    total, macs = count_macs(tower.module, tower.family)
    sizes = [count_parameters(block) for block in tower.blocks]
    for forgets in (False, True):
        cut = skipat_surgery.apply(copy.deepcopy(stock), {1: PhiConfig(pool=0), 5: PhiConfig.paper()})
        report = skipat_surgery.report(skipat_surgery.forget(cut) if forgets else cut)
        assert [block.macs_before for block in report.blocks] == macs
        assert [block.parameters_before for block in report.blocks] == sizes
        assert report.macs_before == total


@of_timm_alone
@torch.no_grad()
def test_phi_follows_timms_set_input_size_and_so_does_what_is_restored(name: str) -> None:
    case = case_named(name)
    stock, images = case.model(), case.images((48, 64))
    cut = cut_of(stock, [1, 2, 5])
    for model in (stock, cut):
        model.set_input_size(img_size=(48, 64))
    found = case.tensors(cut, images)
    expected = case.tensors(stock, images)
    with equations(case, stock, cut, images):
        assert_same(found, case.tensors(stock, images), atol=1e-10, rtol=1e-10)
    assert_same(case.tensors(skipat_surgery.restore(cut), images), expected, atol=0, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["SwinModel", "DonutSwinModel"])
@pytest.mark.parametrize("return_dict", [True, False], ids=["dict", "tuple"])
def test_the_attention_map_of_a_stage_is_none_where_its_last_block_is_skipped(name: str, return_dict: bool) -> None:
    case = case_named(name)
    stock, images = case.model(), case.images()
    stock.set_attn_implementation("eager")
    options = {"output_attentions": True, "output_hidden_states": True, "return_dict": return_dict}
    expected, found = (maps_in(case.call(model, images, **options)) for model in (stock, cut_of(stock, [2, 5])))
    assert expected[0].shape == found[0].shape == (18, 2, 9, 9)
    assert [map_ is None for map_ in found] == [False, True]


def maps_in(output: Any) -> tuple[Any, ...]:
    """The attention maps of 9 tokens in each window, of each stage."""
    entries = output.values() if isinstance(output, dict) else output
    return next(entry for entry in entries if isinstance(entry, tuple) and entry[0].shape[-1] == 9)


@torch.no_grad()
def test_feature_maps_of_all_stages() -> None:
    settings = {
        **SHAPE,
        "img_size": 32,
        "patch_size": 4,
        "window_size": 3,
        "features_only": True,
        "feature_cls": "getter",
    }
    stock = timm.create_model("swin_tiny_patch4_window7_224", **settings).double().eval()
    cut = cut_of(stock, [1, 2, 5], PhiConfig(pool=0))
    images = batches(1)[0]
    found = cut(images)
    weights = {index: phi_weights(Tower.of(cut).blocks[index]) for index in (1, 2, 5)}
    with paper_equations(stock, InStages("model.layers.{}.blocks.{}.attn", (4, 2)), 6, weights, (8, 8), 0, grids=GRIDS):
        assert_same(found, stock(images), atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_a_segmenter_that_holds_a_swin_as_its_backbone() -> None:
    case = case_named("SwinBackbone")
    config = transformers.UperNetConfig(
        backbone_config=transformers.SwinConfig(**SWIN, **BACKBONE),
        hidden_size=16,
        pool_scales=[1, 2],
        use_auxiliary_head=False,
        num_labels=5,
    )
    stock = transformers.UperNetForSemanticSegmentation(config).double().eval()
    cut, images = cut_of(stock, [1, 2, 5]), case.images()
    found = cut(images).logits
    weights = {index: phi_weights(Tower.of(cut).blocks[index]) for index in (1, 2, 5)}
    msa = InStages("backbone.swin.encoder.layers.{}.blocks.{}.attention", (4, 2))
    with paper_equations(stock, msa, 6, weights, (8, 8), 0, grids=GRIDS):
        torch.testing.assert_close(found, stock(images).logits, atol=1e-10, rtol=1e-10)
