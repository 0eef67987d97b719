"""Contract 8: `restore` to the bit, and an `apply` that fails changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import CASES, Case
from models import SKIP, assert_same
from torch import nn

import skipat_surgery
from skipat_surgery import PhiConfig
from skipat_surgery.core import cutting

pytestmark = [pytest.mark.contract("restore"), pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)]


def state(model: nn.Module) -> dict[str, object]:
    """All that can be seen of a model: classes, attributes, hooks and weights."""
    classes = {name: type(module) for name, module in model.named_modules()}
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    config = copy.deepcopy(model.config.to_dict()) if hasattr(model, "config") else None
    return {"classes": classes, "attributes": attributes, "hooks": hooks, "config": config}


@torch.no_grad()
def test_restore_is_bit_exact(case: Case) -> None:
    model, images = case.model(), case.images()
    outputs = case.tensors(model, images)
    before, weights = state(model), copy.deepcopy(model.state_dict())
    skipat_surgery.restore(skipat_surgery.apply(model, SKIP))
    assert state(model) == before
    assert_same(model.state_dict(), weights, atol=0, rtol=0)
    assert_same(case.tensors(model, images), outputs, atol=0, rtol=0)
    skipat_surgery.apply(model, [2])  # and it can be cut anew


def test_dropped_weights_are_gone_and_all_the_rest_keeps_its_name(case: Case) -> None:
    stock = case.model()
    cut = skipat_surgery.apply(copy.deepcopy(stock), [2, 3], PhiConfig.paper())
    kept = {name for name in cut.state_dict() if ".phi." not in name}
    gone = set(stock.state_dict()) - kept
    blocks = [case.block(index) for index in (2, 3)]
    assert kept <= set(stock.state_dict())
    assert {name for name in stock.state_dict() if any(name.startswith(case.msa.format(i)) for i in (2, 3))} <= gone
    assert all(any(name.startswith(block) for block in blocks) for name in gone)
    assert not any(name.startswith((f"{block}.mlp", f"{block}.ffn")) for name in gone for block in blocks)


def test_where_a_part_of_the_msa_is_kept_every_weight_stays(case: Case) -> None:
    if case.depths or case.folded:
        pytest.skip("its blocks attend within windows, and clusters keep nothing of such an MSA")
    stock = case.model()
    phis = {2: PhiConfig(prefix="pass"), 3: PhiConfig(pool=0 if case.prefix + case.suffix else 2)}
    cut = skipat_surgery.apply(copy.deepcopy(stock), phis)
    kept = {name: weight for name, weight in cut.state_dict().items() if ".phi." not in name}
    assert_same(kept, dict(stock.state_dict()), atol=0, rtol=0)


def test_cutting_twice_is_refused(case: Case) -> None:
    model = skipat_surgery.apply(case.model(), SKIP)
    before = state(model)
    with pytest.raises(ValueError, match=r"already cut; call skipat_surgery.restore\(model\) first"):
        skipat_surgery.apply(model, [1])
    assert state(model) == before


def test_a_failed_apply_leaves_the_model_untouched(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = case.model()
    before, weights = state(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"skip names \[9\]"):
        skipat_surgery.apply(model, [2, 9])
    monkeypatch.setattr(cutting, "Phi", lambda *args: 1 / 0)  # such as running out of memory
    with pytest.raises(ZeroDivisionError):
        skipat_surgery.apply(model, [2, 3])
    assert state(model) == before
    assert_same(model.state_dict(), weights, atol=0, rtol=0)
