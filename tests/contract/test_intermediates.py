"""Contract 5: hidden states, feature maps, intermediates and attention maps stand where the stock model has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, Case, output_tensors
from models import SKIP, assert_same, cut_of, equations, unless_the_stock_model_fails_too
from small_models import DEPTH
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

pytestmark = [
    pytest.mark.contract("intermediates"),
    pytest.mark.parametrize("case", CASES, ids=lambda case: case.name),
]
CLOSE = {"atol": 1e-9, "rtol": 1e-9}


@torch.no_grad()
def test_hidden_states(case: Case) -> None:
    if case.host != "transformers":
        pytest.skip("timm has forward_intermediates instead, torchvision's feature extractor")
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
        lambda model, images, early, **options: model.forward_intermediates(images, **options),
        lambda model, images, early, **options: model.forward_intermediates(
            images, indices=early, stop_early=True, intermediates_only=True, **options
        ),
        lambda model, images, early, **options: model.get_intermediate_layers(images, n=[0, 2, 5], reshape=True),
    ],
    ids=["forward_intermediates", "stopped early", "get_intermediate_layers"],
)
def test_timm_intermediates(case: Case, how: Any) -> None:
    stock, images = case.model(), case.images()
    if not case.is_timm:
        pytest.skip("not a timm model")
    options: dict[str, Any] = {} if case.sizes is None else {"output_fmt": "NLC"}  # patches form no one map
    options["early"] = [0] if case.depths else [1, 3]  # the first stage, or two blocks

    def tensors(model: nn.Module) -> list[Tensor]:
        return output_tensors(case.without_padding(how(model, case.argument(images), **options), images))

    try:
        tensors(stock)
    except AttributeError as error:
        pytest.skip(f"not offered by this model: {error}")
    cut = cut_of(stock)
    with equations(case, stock, cut, images):
        assert_same(tensors(cut), tensors(stock), **CLOSE)


def test_torchvisions_feature_extractor(case: Case) -> None:
    """The output of every block, out of a graph of torch.fx, with gradients and without."""
    if case.host == "transformers":
        pytest.skip("torch.fx cannot record models of transformers")
    blocks = [case.block(index) for index in range(DEPTH)]

    def check(model: nn.Module) -> None:
        graph = create_feature_extractor(model, blocks)
        images = case.images(seed=1)
        expected: dict[str, Tensor] = {}
        for name in blocks:
            model.get_submodule(name).register_forward_hook(
                lambda module, args, out, name=name: expected.update({name: out[0] if isinstance(out, tuple) else out})
            )
        case.call(model, images)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert_same(graph(case.argument(images)), expected, **CLOSE)

    unless_the_stock_model_fails_too(case, check)


@torch.no_grad()
@pytest.mark.parametrize("return_dict", [True, False], ids=["dict", "tuple"])
def test_attention_maps_have_none_where_a_block_is_skipped(case: Case, return_dict: bool, exact_softmax: None) -> None:
    if case.host != "transformers" or "TimmWrapper" in case.name:
        pytest.skip("only transformers gives attention maps")
    stock, images = case.model(), case.images()
    stock.set_attn_implementation("eager")
    try:
        case.call(stock, images, output_attentions=True, return_dict=return_dict)
    except (AttributeError, TypeError) as error:
        pytest.skip(f"the stock model fails too: {error}")
    cut = cut_of(stock)
    found = attention_maps(case.call(cut, images, output_attentions=True, return_dict=return_dict))
    with equations(case, stock, cut, images):
        expected = attention_maps(case.call(stock, images, output_attentions=True, return_dict=return_dict))
    if expected is None:
        pytest.skip("the stock model gives no attention maps here")
    assert found is not None
    assert len(found) == len(expected) >= DEPTH
    assert [index for index, map_ in enumerate(found) if map_ is None] == list(SKIP)
    assert_same(
        [map_ for map_ in found if map_ is not None],
        [map_ for i, map_ in enumerate(expected) if i not in SKIP],
        **CLOSE,
    )


def attention_maps(output: Any) -> tuple[Any, ...] | None:
    """The one entry of an output that holds a (B, heads, N, N) map for each block, and perhaps more for later ones."""
    if hasattr(output, "vision_model_output"):
        output = output.vision_model_output
    entries = output.values() if isinstance(output, dict) else output
    for entry in entries:
        if isinstance(entry, tuple) and len(entry) >= DEPTH and getattr(entry[0], "ndim", 0) == 4:
            if entry[0].shape[2] == entry[0].shape[3] and entry[0].shape[1] == 4:
                return entry
    return None
