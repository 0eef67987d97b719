"""Contract 9: a saved model loads again, the same to the bit."""

from __future__ import annotations

from pathlib import Path
from tempfile import mkdtemp

import pytest
import timm
import torch
from cases import CASES, Case
from models import assert_same, cut_of, unless_the_stock_model_fails_too
from timm.models import save_for_hf
from torch import nn

import skipat_surgery
from skipat_surgery import operation

pytestmark = [pytest.mark.contract("save, load"), pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)]


@torch.no_grad()
def test_a_transformers_model_loads_again(case: Case, tmp_path: Path) -> None:
    if case.is_timm:
        pytest.skip("a timm model")

    def check(model: nn.Module) -> None:
        folder, images = mkdtemp(dir=tmp_path), case.images().float()
        model.float().save_pretrained(folder)
        loaded = type(model).from_pretrained(folder)
        assert_same(case.tensors(loaded, images), case.tensors(model, images), atol=0, rtol=0)
        if operation.record_of(model) is None:
            return
        assert skipat_surgery.report(loaded) == skipat_surgery.report(model)
        with pytest.raises(ValueError, match=r"loaded from a cut checkpoint.*load the model that it was made from"):
            skipat_surgery.restore(loaded)

    unless_the_stock_model_fails_too(case, check)


@torch.no_grad()
def test_a_timm_model_loads_again(case: Case, tmp_path: Path) -> None:
    if not case.is_timm:
        pytest.skip("a transformers model")
    stock, images = case.model().float(), case.images().float()
    try:
        save_for_hf(stock, tmp_path / "stock")
        timm.create_model(f"local-dir:{tmp_path / 'stock'}", pretrained=True)
    except Exception as error:
        pytest.skip(f"the stock model cannot be saved so either: {error}")
    cut = cut_of(stock)
    save_for_hf(cut, tmp_path / "cut")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'cut'}", pretrained=True).eval()
    assert skipat_surgery.report(loaded).blocks == skipat_surgery.report(cut).blocks
    assert_same(case.tensors(loaded, images), case.tensors(cut, images), atol=0, rtol=0)
