"""Contract 5: hidden states, feature maps, intermediates and attention maps stand where the stock model has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, Case, output_tensors
from models import SKIP, assert_same, cut_of, equations
from small_models import DEPTH

pytestmark = [
    pytest.mark.contract("intermediates"),
    pytest.mark.parametrize("case", CASES, ids=lambda case: case.name),
]
CLOSE = {"atol": 1e-9, "rtol": 1e-9}


@torch.no_grad()
def test_hidden_states(case: Case) -> None:
    if case.is_timm:
        pytest.skip("timm has forward_intermediates instead")
    stock, images = case.model(), case.images()
    cut = cut_of(stock)
    found = case.call(cut, images, output_hidden_states=True)
    with equations(case, stock, cut, images):
        expected = case.call(stock, images, output_hidden_states=True)
    assert found.keys() == expected.keys()
    assert len(output_tensors(expected)) > len(case.tensors(stock, images))
    assert_same(output_tensors(found), output_tensors(expected), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize(
    "how",
    [
        lambda model, images: model.forward_intermediates(images),
        lambda model, images: model.forward_intermediates(
            images, indices=[1, 3], stop_early=True, intermediates_only=True
        ),
        lambda model, images: model.get_intermediate_layers(images, n=[0, 2, 5], reshape=True),
    ],
    ids=["forward_intermediates", "stopped early", "get_intermediate_layers"],
)
def test_timm_intermediates(case: Case, how: Any) -> None:
    stock, images = case.model(), case.images()
    if not case.is_timm:
        pytest.skip("not a timm model")
    try:
        how(stock, images)
    except AttributeError as error:
        pytest.skip(f"not offered by this model: {error}")
    cut = cut_of(stock)
    with equations(case, stock, cut, images):
        assert_same(output_tensors(how(cut, images)), output_tensors(how(stock, images)), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("return_dict", [True, False], ids=["dict", "tuple"])
def test_attention_maps_have_none_where_a_block_is_skipped(case: Case, return_dict: bool, exact_softmax: None) -> None:
    if case.is_timm or "TimmWrapper" in case.name:
        pytest.skip("timm gives no attention maps")
    stock, images = case.model(), case.images()
    stock.set_attn_implementation("eager")
    cut = cut_of(stock)
    found = attention_maps(case.call(cut, images, output_attentions=True, return_dict=return_dict))
    with equations(case, stock, cut, images):
        expected = attention_maps(case.call(stock, images, output_attentions=True, return_dict=return_dict))
    if expected is None:
        pytest.skip("the stock model gives no attention maps here")
    assert found is not None
    assert len(found) == len(expected) == DEPTH
    assert [index for index, map_ in enumerate(found) if map_ is None] == list(SKIP)
    assert_same(
        [map_ for map_ in found if map_ is not None], [expected[i] for i in range(DEPTH) if i not in SKIP], **CLOSE
    )


def attention_maps(output: Any) -> tuple[Any, ...] | None:
    """The one entry of an output that holds a (B, heads, N, N) map for each block."""
    if hasattr(output, "vision_model_output"):
        output = output.vision_model_output
    entries = output.values() if isinstance(output, dict) else output
    for entry in entries:
        if isinstance(entry, tuple) and len(entry) == DEPTH and getattr(entry[0], "ndim", 0) == 4:
            if entry[0].shape[2] == entry[0].shape[3] and entry[0].shape[1] == 4:
                return entry
    return None
