"""DaViT and Florence-2: a part of each block attends within windows, and is skipped; the next, over channels, stays."""

from __future__ import annotations

from typing import Any

import pytest
import reference_stages
import timm
import torch
from cases import Case, InStages, case_named
from cases.dual import FLORENCE
from models import assert_same, cut_of
from reference import paper_equations, phi_weights
from torch import Tensor, nn
from transformers import Florence2VisionBackbone, Florence2VisionConfig

import skipat_surgery
from skipat_surgery import UnsupportedModelError
from skipat_surgery.observing import z_of
from skipat_surgery.tower import Tower

NAMES = ("Florence2VisionBackbone", "timm davit", "timm davit with named blocks")
every_tower = pytest.mark.parametrize("case", list(map(case_named, NAMES)), ids=NAMES)


def msa_of(case: Case) -> InStages:
    assert isinstance(case.msa, InStages)
    return case.msa


@torch.no_grad()
@every_tower
@pytest.mark.parametrize("size", [(45, 37), (30, 64)], ids=str)
def test_sides_that_are_no_whole_number_of_patches_or_windows(case: Case, size: tuple[int, int]) -> None:
    """Of patches of 4, the second stage of 8, and windows of 3."""
    stock, images = case.model(), case.images(size)
    cut = cut_of(stock, [1, 3, 5])
    found = case.tensors(cut, images)
    grid = tuple(-(-side // 4) for side in size)
    grids = [grid] * 4 + [tuple(-(-side // 8) for side in size)] * 2
    tower = Tower.of(cut)
    assert [tower.layout_in(index, tower.layout(images)) for index in range(6)] == grids
    weights = {index: phi_weights(tower.blocks[index]) for index in (1, 3, 5)}
    with paper_equations(stock, msa_of(case), 6, weights, grid, 0, grids=grids):
        assert_same(found, case.tensors(stock, images), atol=1e-10, rtol=1e-10)


@torch.no_grad()
@every_tower
def test_z_is_on_the_map_in_an_untouched_tower_and_in_a_cut_one(case: Case) -> None:
    stock, images = case.model(), case.images()
    expected: dict[int, Tensor] = {}

    def keep(index: int, grid: tuple[int, ...]) -> Any:
        block = stock.get_submodule(case.msa.format(index).rpartition(".")[0])
        places = reference_stages.places(block, grid)
        return lambda module, args, z: expected.update({index: reference_stages.tokens(z, places, grid)})

    hooks = [
        stock.get_submodule(case.msa.format(index)).register_forward_hook(keep(index, grid))
        for index, grid in ((0, (8, 8)), (1, (8, 8)), (4, (4, 4)))
    ]
    case.tensors(stock, images)
    for hook in hooks:
        hook.remove()
    assert {index: z.shape[1:] for index, z in expected.items()} == {0: (64, 16), 1: (64, 16), 4: (16, 32)}
    assert_same(z_of(Tower.of(stock), [0, 1, 4], images), expected)
    assert_same(z_of(Tower.of(cut_of(stock, [2])), [0, 1], images), {index: expected[index] for index in (0, 1)})


@every_tower
def test_what_is_trained_behind_the_cut(case: Case) -> None:
    """The part that attends over channels, and what merges patches, which Florence-2 keeps apart."""
    cut = skipat_surgery.apply(case.model(), [2])
    skipat_surgery.freeze_untouched(cut)
    trained = {name for name, parameter in cut.named_parameters() if parameter.requires_grad}
    merging = "convs.1.conv.weight" if case.host == "transformers" else "stages.1.downsample.conv.weight"
    parts = {name.removeprefix(f"{case.block(2)}.").partition(".")[0] for name in trained if case.block(2) in name}
    assert merging in trained
    assert len(parts) == 3  # and Φ
    assert not any(name.startswith((case.block(1), "convs.0", "stem")) for name in trained)


@torch.no_grad()
def test_the_whole_of_florence_generates_as_its_equations_do() -> None:
    case = case_named("Florence2ForConditionalGeneration")
    stock, images = case.model(), case.images()
    cut = cut_of(stock, [2, 3, 5])
    given: dict[str, Any] = {**case.given(images), **case.inputs(2), "max_new_tokens": 4, "do_sample": False}
    given |= {"return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}
    found = cut.generate(**given)
    weights = {index: phi_weights(cut.get_submodule(case.block(index))) for index in (2, 3, 5)}
    with paper_equations(stock, msa_of(case), 6, weights, (8, 8), 0, grids=case.grids(images)):
        expected = stock.generate(**given)
    assert torch.equal(found.sequences, expected.sequences)
    assert_same(found.logits, expected.logits, atol=1e-5, rtol=1e-5)


def small_davit(**differs: Any) -> nn.Module:
    settings: dict[str, Any] = {"depths": (2, 2), "embed_dims": (16, 32), "num_heads": (2, 4), "num_classes": 5}
    return timm.create_model("davit_tiny", **{**settings, **differs})


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: small_davit(attn_types=("channel", "spatial")), "windows first, and then over channels; leave"),
        (lambda: small_davit(attn_types=("channel",), named_blocks=True), "windows first, and then over channels"),
        (lambda: small_davit(embed_dims=(16, 48)), "embed_dims that double, and a down_kernel_size of 2 or odd"),
        (lambda: small_davit(down_kernel_size=4), "embed_dims that double, and a down_kernel_size of 2 or odd"),
        (lambda: florence(embed_dim=(16, 24)), "patch_stride 2 from the second stage on, and an embed_dim that"),
        (lambda: florence(patch_stride=(4, 3)), "patch_stride 2 from the second stage on"),
        (lambda: florence(patch_padding=(3, 0)), "give it odd patch_size with patch_padding of half of it"),
    ],
)
def test_other_shapes_are_refused_with_what_to_give(build: Any, match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        skipat_surgery.apply(build(), [1])


def florence(**differs: Any) -> nn.Module:
    return Florence2VisionBackbone(Florence2VisionConfig(**{**FLORENCE, **differs}))


def test_florences_images_are_those_of_its_processor_where_the_config_does_not_tell() -> None:
    config = Florence2VisionConfig(**{name: value for name, value in FLORENCE.items() if name != "image_size"})
    cut = skipat_surgery.apply(Florence2VisionBackbone(config), [1])
    assert skipat_surgery.report(cut).towers[0].grid == (192, 192)
