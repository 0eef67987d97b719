"""Contract 2: gradients by value, with and without checkpointing, and over two forwards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import timm.layers
from cases import CASES, Case
from models import (
    assert_same,
    cut_of,
    equations,
    gradients,
    phi_weights,
    skip_unless_trainable,
    unless_the_stock_model_fails_too,
)
from torch import Tensor, nn

from skipat_surgery import Phi

pytestmark = [pytest.mark.contract("gradients"), pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)]
CLOSE = {"atol": 1e-10, "rtol": 1e-8}


@contextmanager
def checkpointing(case: Case, model: nn.Module, reentrant: bool) -> Iterator[None]:
    """Checkpoint a model the way its library does."""
    if not case.is_timm:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    before = timm.layers.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(reentrant)
    try:
        if case.is_timm:
            getattr(model, "model", model).set_grad_checkpointing()
        yield
    finally:
        timm.layers.set_reentrant_ckpt(before)


@pytest.mark.usefixtures("exact_steps")
def test_every_parameter_gets_the_gradient_of_the_equations(case: Case) -> None:
    stock = case.model()
    cut = cut_of(stock)
    images = case.images()
    found = gradients(case, cut, images)
    used = gradients(case, stock, images).keys()
    skip_unless_trainable(case, used)
    assert {name for name, _ in cut.named_parameters() if ".phi." not in name} & used <= found.keys()
    weights = phi_weights(case, cut)
    with equations(case, stock, cut, images, weights):
        expected = gradients(case, stock, images)
    for index, named in weights.items():
        block = case.block(index)
        expected |= {f"{block}.phi.{name}": w.grad for name, w in named.items() if w.grad is not None}
    dropped = expected.keys() - found.keys()
    assert all(expected[name].abs().max() == 0 for name in dropped)  # the equations do not depend on them
    assert_same(found, {name: value for name, value in expected.items() if name not in dropped}, **CLOSE)
    assert any(value.abs().max() > 0 for name, value in found.items() if ".phi." in f".{name}")


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_changes_no_gradient(case: Case, reentrant: bool) -> None:
    stock = case.model()
    cut = cut_of(stock)
    images = case.images()
    for model in (stock, cut):
        model.train()
        for module in model.modules():
            if isinstance(module, (nn.Dropout, nn.BatchNorm2d)):
                module.eval()
    expected = gradients(case, cut, images)
    plain = gradients(case, stock, images)
    try:
        with checkpointing(case, stock, reentrant):
            assert_same(gradients(case, stock, images), plain, **CLOSE)
    except Exception as error:
        pytest.skip(f"the stock model cannot be checkpointed so either: {error}")
    with checkpointing(case, cut, reentrant):
        assert_same(gradients(case, cut, images), expected, **CLOSE)


def test_checkpointing_runs_the_blocks_again(case: Case) -> None:
    cut = cut_of(case.model()).train()
    if case.host == "torchvision" or getattr(cut, "supports_gradient_checkpointing", True) is False:
        pytest.skip("the stock model has no checkpointing")
    skip_unless_trainable(case, gradients(case, cut, case.images()))

    def runs(model: nn.Module, path: str) -> int:
        calls: list[int] = []
        model.get_submodule(path).register_forward_hook(lambda *args: calls.append(1))
        with checkpointing(case, model, False):
            gradients(case, model, case.images())
        return len(calls)

    found = runs(cut, f"{case.block(3)}.phi")
    if found == 1 and runs(case.model().train(), case.msa.format(3)) == 1:
        pytest.skip("the stock model checkpoints what lies around its blocks alone")
    assert found in (2, 3)  # Swin checkpoints its stages too, and again a block within one


@pytest.mark.filterwarnings("ignore:For backward hooks to be called", "ignore:Full backward hook is firing")
def test_backward_hooks_on_every_module_change_no_gradient(case: Case) -> None:
    """Such a hook gives a module another tensor than it was called with, and a view that must not be written into."""

    def check(model: nn.Module) -> None:
        expected = gradients(case, model, case.images())
        seen: set[str] = set()
        for name, module in model.named_modules():
            module.register_full_backward_hook(lambda *args, name=name: seen.add(name))
        assert_same(gradients(case, model, case.images()), expected, **CLOSE)
        assert {name.rpartition(".")[0] for name in expected if ".phi." in f".{name}"} <= seen

    unless_the_stock_model_fails_too(case, check)


def test_two_forwards_before_one_backward(case: Case) -> None:
    cut = cut_of(case.model())
    first, second = case.images(seed=1), case.images(seed=2)
    together = gradients(case, cut, first, second)
    apart = [gradients(case, cut, images) for images in (first, second)]
    assert_same(together, {name: apart[0][name] + apart[1][name] for name in together}, **CLOSE)


def test_a_forward_that_is_thrown_away_leaves_nothing_behind(case: Case) -> None:
    """No backward frees its graph, and Python's garbage collector does not see circles that lead through autograd."""
    cut = cut_of(case.model())
    seen: list[weakref.ref[Tensor]] = []
    for module in cut.modules():
        if isinstance(module, Phi):
            module.register_forward_hook(lambda _, args, z: seen.extend(map(weakref.ref, (args[0], z))))
    out = case.tensors(cut, case.images())
    assert seen
    del out
    gc.collect()
    assert [ref() for ref in seen] == [None] * len(seen)
