"""A cut timm checkpoint, created for other images than it was saved for, fits its weights as the stock model does."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from cases import CASES, Case
from models import cut_of
from small_models import timm_model
from torch import nn

from skipat_surgery import PhiConfig
from skipat_surgery.timm_model import save

BUILT_BY_NAME = [case for case in CASES if case.is_timm and not case.name.endswith(("res-post", "features only"))]
OTHERS = {
    "other size": {"img_size": 48},
    "other shape": {"img_size": (64, 32)},
    "one channel": {"in_chans": 1},
    "five channels": {"in_chans": 5},
    "other size, classes and channels": {"img_size": 48, "in_chans": 1, "num_classes": 3},
}


def created(folder: Any, seed: int, **other: Any) -> nn.Module:
    torch.manual_seed(seed)  # for a new head
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **other)


def assert_fits_as_the_stock_model(stock: nn.Module, other: dict[str, Any], phi: PhiConfig, tmp_path: Any) -> None:
    cut = cut_of(stock, (2, 3, 5), phi)
    save(stock, tmp_path / "stock")
    cut.save_pretrained(tmp_path / "cut")
    try:
        fitted = created(tmp_path / "stock", 0, **other).state_dict()
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:  # NesT asserts, DaViT takes no size
        pytest.skip(f"the stock model cannot be fitted either: {error}")
    found = created(tmp_path / "cut", 0, **other).state_dict()
    assert found.keys() == cut.state_dict().keys()
    for name, value in found.items():
        expected = cut.state_dict()[name] if ".phi." in name else fitted[name]
        if "num_classes" not in other or not name.startswith("head"):
            torch.testing.assert_close(value, expected, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("case", BUILT_BY_NAME, ids=lambda case: case.name)
def test_created_for_other_images(case: Case, other, tmp_path):
    assert_fits_as_the_stock_model(case.model().float(), other, PhiConfig(), tmp_path)


def test_with_the_papers_phi(tmp_path):
    case = next(case for case in CASES if case.name == "timm relpos")
    assert_fits_as_the_stock_model(case.model().float(), OTHERS["other size"], PhiConfig.paper(), tmp_path)


@pytest.mark.parametrize("name", ["flexivit_small", "vit_base_patch16_radio_v3"])
def test_models_whose_position_embeddings_timm_resizes_in_another_way(name, tmp_path):
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    stock = timm_model(name)()
    nn.init.normal_(stock.pos_embed)
    assert_fits_as_the_stock_model(stock, OTHERS["other size"], PhiConfig(), tmp_path)


@torch.no_grad()
def test_at_another_size_it_gives_what_timms_set_input_size_gives(tmp_path):
    cut = cut_of(next(case for case in CASES if case.name == "timm vit").model()).float()
    cut.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    found = created(tmp_path, 0, img_size=48).eval()(images)
    cut.set_input_size(img_size=48)
    torch.testing.assert_close(found, cut(images))
