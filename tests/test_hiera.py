"""Hiera: tokens in units, in stages whose first MSA makes the map smaller, within units or global.

Blocks 0, 1 to 3, and 4 and 5 are stages, on grids of 8×16, 4×8 and 2×4.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reference_stages
import reference_units
import timm
import torch
from cases import InStages, case_named
from cases.units import TIMM
from models import assert_same, cut_of
from reference import paper_equations, phi_weights
from torch import Tensor, nn

import skipat_surgery
from skipat_surgery import PhiConfig
from skipat_surgery.analysis.last_block import read_last_block
from skipat_surgery.commands.strip import _grids
from skipat_surgery.convert.states import Walk
from skipat_surgery.core.units import Units
from skipat_surgery.measure.counting import count_macs, count_parameters
from skipat_surgery.measure.limit import limit
from skipat_surgery.measure.token_merging import merge_tokens
from skipat_surgery.observing import outputs_of, z_of
from skipat_surgery.tower import Tower

both_hosts = pytest.mark.parametrize("name", ["HieraModel", "timm hiera"])


def batches(count: int = 8, of: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(of, 3, 16, 32, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("times", range(4))
def test_tokens_in_units_are_those_of_the_reference_and_of_the_host(times: int) -> None:
    grid = (8 * 2, 8 * 3)
    x = torch.randn(2, 16 * 24, 5)
    hosts = timm.models.hiera.Unroll((16, 24), (1, 1), [(2, 2)] * times)(x)
    units = Units(2, times)
    assert torch.equal(units.put_back(x, grid), hosts)
    assert torch.equal(units.tokens(hosts, grid), x)
    assert torch.equal(reference_stages.tokens(hosts, reference_units.places(grid, times), grid), x)


@torch.no_grad()
@both_hosts
def test_z_is_on_the_map_in_an_untouched_tower_and_in_a_cut_one(name: str) -> None:
    """The very output of the MSA, as the host itself rolls it up to a map."""
    case = case_named(name)
    stock, images = case.model(), case.images()
    tower, made = Tower.of(stock), {}
    for index in range(6):
        tower.msa_slot(index).register_forward_hook(
            lambda module, args, out, index=index: made.update({index: out[0] if isinstance(out, tuple) else out})
        )
    case.call(stock, images)
    rolled = stock.encoder.reroll if name == "HieraModel" else stock.reroll
    numbers = [0, 1, 1, 1, 2, 2] if name == "HieraModel" else range(6)
    # timm's schedule of a block is that of its stage; a block that pools gives what lies as its stage's tokens do.
    expected = {index: rolled(made[index], number).flatten(1, 2) for index, number in enumerate(numbers)}
    found = z_of(Tower.of(case.model()), range(6), images)
    assert [found[index].shape[1:] for index in (0, 1, 4)] == [(128, 8), (32, 16), (8, 32)]
    assert_same(found, expected, atol=0, rtol=0)
    cut = Tower.of(cut_of(case.model(), [2, 5]))
    assert_same(z_of(cut, [0, 1], images), {index: found[index] for index in (0, 1)}, atol=1e-12, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("phi", [PhiConfig(pool=0), PhiConfig.paper()], ids=["reads X", "paper"])
def test_a_map_that_is_parted_twice_more_in_all_stages(phi: PhiConfig) -> None:
    stock = timm.create_model("hiera_tiny_224", **{**TIMM, "q_pool": 0, "stages": (4, 1, 1)}).double().eval()
    images = batches(1)[0]
    cut = cut_of(stock, [1, 3], phi)
    found = cut(images)
    weights = {index: phi_weights(cut.blocks[index]) for index in (1, 3)}
    msa = InStages("blocks.{}.attn", (4, 1, 1), flat=True)
    with paper_equations(stock, msa, 6, weights, (8, 16), 0, grids=[(8, 16)] * 6, units=[2] * 6):
        torch.testing.assert_close(found, stock(images), atol=1e-10, rtol=1e-10)


@torch.no_grad()
@both_hosts
def test_a_walk_over_the_blocks_is_the_models_own_forward(name: str) -> None:
    case = case_named(name)
    cut, images, inputs = cut_of(case.model(), [2, 5]), case.images(), []
    tower = Tower.of(cut)
    for block in tower.blocks:
        block.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    case.call(cut, images)
    walk = Walk(tower, 2)
    walk.start(images)
    for index in range(2, 6):
        torch.testing.assert_close(walk.states[0].x, inputs[index], atol=1e-12, rtol=0)
        assert walk.states[0].grid == case.grids(images)[index]
        walk.move_on()


@both_hosts
def test_it_is_solved_aligned_and_distilled(name: str) -> None:
    stock = case_named(name).model()
    cut = skipat_surgery.apply(copy.deepcopy(stock), {2: PhiConfig(pool=0), 3: PhiConfig(), 5: PhiConfig()})
    solved = skipat_surgery.solve(cut, stock, batches(), progress=False)
    assert all(error < 0.9 for error in solved.patches.values())
    assert skipat_surgery.align(cut, stock, batches(2), steps=2, progress=False).steps == 2
    model, teacher, data = cut.float(), stock.float(), [batch.float() for batch in batches(2)]
    assert len(skipat_surgery.distill(model, teacher, data, steps=2, progress=False).losses) == 2
    assert skipat_surgery.cka(model, data, progress=False).msa.shape == (6, 6)


@pytest.mark.parametrize("name", ["HieraModel, within units", "timm hiera, within units"])
def test_an_msa_is_refitted_whose_tokens_lie_in_units(name: str) -> None:
    """W_o, spoilt, is brought back: what it reads lies in units, what it is fitted to on the map."""
    stock = case_named(name).model()
    cut = skipat_surgery.apply(copy.deepcopy(stock), [2, 5])
    skipat_surgery.solve(cut, stock, batches(), progress=False)
    spoilt, right = (Tower.of(model).msa_slot(3).proj for model in (cut, stock))
    spoilt.weight.data += torch.randn_like(spoilt.weight)
    before = (spoilt.weight - right.weight).norm()
    refitted = skipat_surgery.refit(cut, stock, batches(), progress=False)
    assert (spoilt.weight - right.weight).norm() < 0.5 * before
    assert all(refitted.after[index] <= refitted.before[index] for index in refitted.after)


def test_blocks_within_units_have_no_clusters_and_global_ones_have() -> None:
    within, mixed = (case_named(name).model() for name in ("timm hiera, within units", "timm hiera"))
    assert all(phi.pool == 0 for phi in Tower.of(skipat_surgery.apply(within, [2, 3])).config.phi.values())
    assert all(phi.pool == 2 for phi in Tower.of(skipat_surgery.apply(mixed, [2, 3])).config.phi.values())


@both_hosts
def test_where_a_global_msa_is_kept_every_weight_stays(name: str) -> None:
    stock = case_named(name).model()
    cut = skipat_surgery.apply(copy.deepcopy(stock), [2, 3])
    kept = {name: weight for name, weight in cut.state_dict().items() if ".phi." not in name}
    assert_same(kept, dict(stock.state_dict()), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("name", "skip", "match"),
    [
        ("HieraModel", [4], r"skip names \[4\], where a stage of HieraModel begins.*allowed are 2 to 3, 5, counted"),
        ("timm hiera", [1], r"skip names \[1\], where a stage of Hiera begins"),
        ("HieraModel, within units", {2: PhiConfig()}, r"block 2 attends within windows"),
    ],
)
def test_what_cannot_be_skipped(name: str, skip: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        skipat_surgery.apply(case_named(name).model(), skip)


def test_images_and_masks_that_a_cut_model_cannot_follow() -> None:
    cut = cut_of(case_named("HieraModel").model(), [2])
    with pytest.raises(ValueError, match=r"configured for, 16×32, got 32×16: resize them"):
        cut(torch.randn(1, 3, 32, 16, dtype=torch.float64), interpolate_pos_encoding=True)
    mask = torch.tensor([[True] * 4 + [False] * 4])
    with pytest.raises(ValueError, match=r"16 tokens of a 4×8 patch grid.*no mask may take units"):
        cut_of(case_named("timm hiera").model(), [2])(batches(1, of=1)[0], mask=mask)


def test_the_stages() -> None:
    expected = [
        (range(1), 8, (8, 16), Units(2, 2)),
        (range(1, 4), 16, (4, 8), Units(2, 1)),
        (range(4, 6), 32, (2, 4), Units(2, 0)),
    ]
    for name in ("HieraModel", "timm hiera"):
        tower = Tower.of(case_named(name).model())
        assert [(stage.blocks, stage.width, stage.grid((8, 16)), stage.units) for stage in tower.stages] == expected
        assert tower.skippable == (2, 3, 5)


@pytest.mark.parametrize("forgets", [False, True], ids=["kept", "forgotten"])
@pytest.mark.parametrize("name", ["HieraModel", "HieraModel, within units", "timm hiera", "timm hiera, within units"])
def test_figures_are_those_of_the_untouched_tower(name: str, forgets: bool) -> None:
    stock = case_named(name).model()
    tower = Tower.of(stock)
    _, macs = count_macs(stock, tower.family)
    phis = dict.fromkeys([2, 3], PhiConfig(pool=0)) | {5: PhiConfig.paper()}
    report = skipat_surgery.report(skipat_surgery.apply(copy.deepcopy(stock), phis, keep_removed=not forgets))
    assert [block.macs_before for block in report.blocks] == macs
    assert [block.parameters_before for block in report.blocks] == [count_parameters(block) for block in tower.blocks]


@torch.no_grad()
@pytest.mark.parametrize("return_dict", [True, False], ids=["dict", "tuple"])
def test_the_attention_map_of_a_stage_is_none_where_its_last_block_is_skipped(return_dict: bool) -> None:
    case = case_named("HieraModel")
    options = {"output_attentions": True, "output_hidden_states": True, "return_dict": return_dict}
    output = case.call(cut_of(case.model(), [3]), case.images(), **options)
    entries = output.values() if isinstance(output, dict) else output
    maps = next(entry for entry in entries if isinstance(entry, tuple) and entry[0].ndim == 5)
    assert [None if map_ is None else tuple(map_.shape) for map_ in maps] == [(2, 2, 8, 16, 16), None, (2, 4, 1, 8, 8)]


@torch.no_grad()
@both_hosts
def test_the_limit_and_the_keys_of_the_last_block(name: str) -> None:
    case = case_named(name)
    stock, images = case.model(), case.images()
    found = case.tensors(limit(stock, [2, 5]), images)
    assert [out.shape for out in found] == [out.shape for out in case.tensors(stock, images)]
    assert read_last_block(Tower.of(stock), images).keys.shape == (2, 2, 4, 32)


@torch.no_grad()
@both_hosts
def test_what_is_compared_lies_on_the_map_of_its_stage(name: str) -> None:
    """As the host itself rolls it up, after a stage that is parted once more and at the end."""
    case = case_named(name)
    model, images = case.model(), case.images()
    outputs = outputs_of(model, Tower.of(model), images, states=[3])
    if name == "HieraModel":
        *_, middle, last = case.call(model, images, output_hidden_states=True).reshaped_hidden_states
    else:
        *_, middle, last = model.forward_intermediates(images, output_fmt="NHWC", intermediates_only=True)
    for found, expected in ((outputs.states[3], middle), (outputs.tokens, last)):
        torch.testing.assert_close(found, expected.flatten(1, 2).float())


def test_a_strip_shows_the_map_of_the_last_stage() -> None:
    case = case_named("HieraModel")
    assert _grids(Tower.of(case.model()), case.images()) == [(2, 4)] * 2


@pytest.mark.parametrize(
    ("within", "match"),
    [((True, False, False), r"\[0, 1\] attend within"), ((False,) * 3, "has stages, whose blocks cost unlike")],
)
def test_a_plan_is_refused(within: tuple[bool, ...], match: str) -> None:
    model = timm.create_model("hiera_tiny_224", **{**TIMM, "mask_unit_attn": within})
    with pytest.raises(ValueError, match=match):
        skipat_surgery.plan(model, batches(1), n_skip=1, progress=False)


@both_hosts
def test_token_merging_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="merges patches itself, from stage to stage"):
        merge_tokens(case_named(name).model(), 2)


@torch.no_grad()
def test_keys_lie_on_the_map_where_it_is_parted_to_the_end() -> None:
    stock = timm.create_model("hiera_tiny_224", **{**TIMM, "q_pool": 1}).double().eval()
    seen: list[Tensor] = []
    stock.blocks[5].attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    keys = read_last_block(Tower.of(stock), batches(1)[0]).keys
    key = stock.blocks[5].attn.qkv.weight.chunk(3)[1], stock.blocks[5].attn.qkv.bias.chunk(3)[1]
    expected = stock.reroll(nn.functional.linear(seen[0], *key), 5).float()
    torch.testing.assert_close(keys, expected, atol=1e-5, rtol=1e-5)
