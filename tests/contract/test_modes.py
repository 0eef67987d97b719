"""Contract 7: precision, training mode, dropout and drop path, and what users do to a module."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CASES, LEADS, Case
from models import cut_of
from torch import Tensor, nn

import skipat_surgery

pytestmark = [pytest.mark.contract("precision, modes")]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_family = pytest.mark.parametrize("case", LEADS, ids=lambda case: case.name)


def cut(case: Case) -> nn.Module:
    """A cut model of ordinary scale: Φ's as large as the host's own fresh weights."""
    torch.manual_seed(0)
    model = skipat_surgery.apply(case.build().eval(), [2, 3])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".phi." in f".{name}":
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    return model


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative deviation of an output, as a norm."""
    pairs = zip(found, expected, strict=True)
    return max(float((mine.float() - theirs.float()).norm() / theirs.float().norm()) for mine, theirs in pairs)


@every_case
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_as_precise_as_in_the_host(case: Case, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    stock, model = case.build().eval(), cut(case)
    images = case.images().float()
    full = [case.tensors(stock, images), case.tensors(model, images)]
    try:
        host = error(case.tensors(stock.to(dtype), images.to(dtype)), full[0])
    except Exception as failure:
        pytest.skip(f"the stock model does not run in {dtype}: {failure}")
    if math.isnan(host):
        pytest.skip(f"the stock model overflows in {dtype}")
    found = case.tensors(model.to(dtype), images.to(dtype))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert error(found, full[1]) < max(4 * host, 0.05)


@every_case
@torch.no_grad()
def test_autocast_is_as_precise_as_in_the_host(case: Case) -> None:
    """Against the host's own deviation: a similarity near zero, as CLIP returns, is ill-conditioned in any model."""
    torch.manual_seed(0)
    stock, model, images = case.build().eval(), cut(case), case.images().float()

    def deviation(which: nn.Module) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            found = case.tensors(which, images)
        return error(found, case.tensors(which, images))

    assert deviation(model) < max(4 * deviation(stock), 0.05)


@every_family
def test_a_model_cut_in_half_precision_has_its_phi_in_it(case: Case) -> None:
    model = skipat_surgery.apply(case.build().bfloat16().train(), [2, 3])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(module.training for module in model.modules())


@every_family
def test_train_eval_requires_grad_and_to_reach_phi(case: Case) -> None:
    model = cut_of(case.model())
    for module in model.train().modules():
        assert module.training
    assert not any(module.training for module in model.eval().modules())
    assert not any(parameter.requires_grad for parameter in model.requires_grad_(False).parameters())
    assert {parameter.dtype for parameter in model.half().parameters()} == {torch.float16}
    assert {parameter.device.type for parameter in model.to("meta").parameters()} == {"meta"}


@every_family
@torch.no_grad()
def test_dropout_and_drop_path_act_on_phi_as_they_did_on_the_msa(case: Case) -> None:
    """Each random module of a skipped block is called in training as often as in the stock block, and acts."""
    stock = case.model()
    for module in stock.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    model = cut_of(stock)
    images = case.images()
    block = case.block(3)
    inside = case.msa.format(3)

    def calls(which: nn.Module) -> dict[str, int]:
        counts: dict[str, int] = {}
        handles = [
            module.register_forward_hook(lambda *args, name=name: counts.update({name: counts.get(name, 0) + 1}))
            for name, module in which.named_modules()
            if name.startswith(block + ".") and not name.startswith(inside) and ".phi" not in name
            if "drop" in type(module).__name__.lower()
        ]
        case.tensors(which.train(), images)
        for handle in handles:
            handle.remove()
        return counts

    def varies(which: nn.Module) -> bool:
        first, second = case.tensors(which, images), case.tensors(which, images)
        return any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))

    assert calls(model) == calls(stock)
    assert varies(model) == varies(stock)  # V-JEPA 2 has dropout that it never calls
    assert not varies(model.eval())
