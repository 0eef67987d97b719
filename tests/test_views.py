"""Linears whose output is a view that autograd lets nobody write into, as those of a model in 8 or 4 bits are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, case_named
from models import assert_same, cut_of, gradients
from torch import Tensor, nn

from skipat_surgery import PhiConfig

PHIS = {
    "default": PhiConfig(),
    "as wide as the model": PhiConfig(expansion=1, channel_attention=True),
    "patches ask": PhiConfig(queries="patches"),
    "no clusters": PhiConfig(prefix="mix", pool=0),
    "paper": PhiConfig.paper(),
}


class Same(torch.autograd.Function):
    """Returns what it is given: for autograd a view made inside a function of one's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class ViewingLinear(nn.Linear):
    """Computes what a Linear does."""

    def forward(self, input: Tensor) -> Tensor:
        return Same.apply(super().forward(input))


def viewing(model: nn.Module) -> nn.Module:
    """The same model, with every Linear replaced."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = ViewingLinear
    return model


def test_such_an_output_cannot_be_written_into():
    out = ViewingLinear(2, 2)(torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        out += 1


@pytest.mark.parametrize("phi", PHIS.values(), ids=PHIS)
@pytest.mark.parametrize("name", ["ViTModel", "timm vit", "IJepaModel"])
def test_a_cut_model_of_them_has_the_gradients_of_ordinary_ones(name, phi):
    case: Case = case_named(name)
    model = cut_of(case.model(), (2, 3, 5), phi)
    expected, output = gradients(case, model, case.images()), case.tensors(model, case.images())
    viewing(model)
    assert_same(case.tensors(model, case.images()), output, atol=1e-12, rtol=1e-12)
    assert_same(gradients(case, model, case.images()), expected, atol=1e-12, rtol=1e-9)
