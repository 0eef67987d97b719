"""An adapter on a cut model names the cut model's class, and is loaded with it."""

from __future__ import annotations

import peft
import pytest
import torch
from cases import case_named
from models import assert_same, cut_of
from transformers import AutoModel, AutoModelForImageClassification

from skipat_surgery import Phi


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "auto_class"),
    [("ViTForImageClassification", AutoModelForImageClassification), ("Dinov2Model", AutoModel)],
)
def test_auto_peft_model(name, auto_class, tmp_path):
    case = case_named(name)
    images = case.images().float()
    cut_of(case.model()).float().save_pretrained(tmp_path / "cut")
    settings = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)  # none of them idle
    adapted = peft.get_peft_model(auto_class.from_pretrained(tmp_path / "cut"), settings).eval()
    adapted.save_pretrained(tmp_path / "adapter")

    found = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["skipat_surgery"]).eval()
    assert type(found.get_base_model()) is type(adapted.get_base_model())
    assert sum(isinstance(module, Phi) for module in found.modules()) == 3
    assert_same(found.state_dict(), adapted.state_dict(), atol=0, rtol=0)
    assert_same(case.tensors(found, images), case.tensors(adapted, images), atol=1e-5, rtol=1e-5)
    plain = auto_class.from_pretrained(tmp_path / "cut").eval()
    assert not torch.allclose(case.tensors(found, images)[0], case.tensors(plain, images)[0])


def test_without_the_allowlist_peft_says_what_to_pass(tmp_path):
    cut_of(case_named("ViTForImageClassification").model()).save_pretrained(tmp_path / "cut")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "cut")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["reduce"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"import_allowlist=\['skipat_surgery.core.modeling'\]"):
        peft.AutoPeftModel.from_pretrained(tmp_path / "adapter")
