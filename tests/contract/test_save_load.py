"""Contract 9: a saved model loads again, the same to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from cases import CASES, Case
from conftest import Once
from models import assert_same, cases_that_use, cut_of
from timm.models import save_for_hf
from torch import nn
from transformers import ViTImageProcessor

import skipat_surgery
from skipat_surgery.commands import loading
from skipat_surgery.core import modeling
from skipat_surgery.core.auto_classes import loader_of

pytestmark = [
    pytest.mark.contract("save, load"),
    pytest.mark.parametrize("case", CASES, ids=lambda case: case.name),
]


@pytest.fixture(scope="module")
def loaded_elsewhere(once: Once, request: pytest.FixtureRequest) -> dict[str, dict[str, str]]:
    """What became of each transformers checkpoint in two new processes: one with the library and one without.

    Both load everything in one go. Empty where the outputs were the same to the bit, twice; else the traceback.
    """

    def run(root: Path) -> None:
        for case in cases_that_use(request):
            if case.host != "transformers":
                continue
            cut, images = cut_of(case.model()).float(), case.images().float()
            cut.save_pretrained(root / case.name)
            with torch.no_grad():
                torch.save((case.name, images, case.tensors(cut, images)), root / case.name / "expected.pt")
        script = Path(__file__).with_name("loading.py")
        environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules.cache")}
        for how in ("library", "remote"):
            subprocess.run([sys.executable, script, root, how], check=True, env=environment, stdin=subprocess.DEVNULL)

    root = once("checkpoints", run)
    return {how: json.loads((root / f"{how}.json").read_text()) for how in ("library", "remote")}


@pytest.mark.parametrize("how", ["library", "remote"])
def test_a_transformers_model_loads_in_a_new_process(
    case: Case, how: str, loaded_elsewhere: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """``remote``: the library is not installed, and ``trust_remote_code=True``."""
    if case.host != "transformers":
        pytest.skip(f"a model of {case.host}")
    failure = loaded_elsewhere[how][case.name]
    if failure and not stock_loads_again(case, tmp_path):
        pytest.skip("the stock model, saved and loaded again, gives other outputs too")
    assert failure == ""


def loaders_of(case: Case, cut: Any) -> dict[str, Callable[[str], Any]]:
    """What gives back a transformers checkpoint: the commands, and the class that its card names."""
    name = loader_of(case.model().__class__)
    named = getattr(modeling if name.startswith("Skipat") else transformers, name)
    assert f"import {name}\n" in cut.card()
    return {"commands": lambda folder: loading.load(folder).model, "card": named.from_pretrained}


@torch.no_grad()
@pytest.mark.parametrize("how", ["commands", "card"])
def test_a_model_of_any_class_is_given_back(case: Case, how: str, tmp_path: Path) -> None:
    if case.host != "transformers":
        pytest.skip(f"a model of {case.host}")
    cut, images = cut_of(case.model()).float(), case.images().float()
    cut.save_pretrained(tmp_path)
    ViTImageProcessor().save_pretrained(tmp_path)
    loaded = loaders_of(case, cut)[how](str(tmp_path))
    assert type(loaded) is type(cut)
    pairs = zip(case.tensors(cut, images), case.tensors(loaded, images), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs) and not stock_loads_again(case, tmp_path / "stock"):
        pytest.skip("the stock model, saved and loaded again, gives other outputs too")
    assert_same(case.tensors(loaded, images), case.tensors(cut, images), atol=0, rtol=0)


def test_commands_build_it_from_its_configuration(case: Case, tmp_path: Path) -> None:
    if case.host == "torchvision":
        pytest.skip("the commands take models of transformers and timm")
    cut = cut_of(case.model()).float()
    if not case.is_timm:
        cut.save_pretrained(tmp_path)
    else:
        save_timm(case, cut, tmp_path)
    assert skipat_surgery.report(loading.build(str(tmp_path))).blocks == skipat_surgery.report(cut).blocks


def test_its_stock_class_refuses_it(case: Case, tmp_path: Path) -> None:
    if case.host != "transformers":
        pytest.skip(f"a model of {case.host}")
    stock = case.model()
    cut_of(stock).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"cut by Skip-Attention.*use an Auto class"):
        type(stock).from_pretrained(tmp_path)


@torch.no_grad()
def stock_loads_again(case: Case, folder: Path) -> bool:
    stock, images = case.model().float(), case.images().float()
    stock.save_pretrained(folder)
    loaded = type(stock).from_pretrained(folder)
    return all(
        torch.equal(a, b) for a, b in zip(case.tensors(stock, images), case.tensors(loaded, images), strict=True)
    )


@torch.no_grad()
def test_a_loaded_model_reports_the_same_and_cannot_be_restored(case: Case, tmp_path: Path) -> None:
    if case.host != "transformers":
        pytest.skip(f"a model of {case.host}")
    cut = cut_of(case.model()).float()
    cut.save_pretrained(tmp_path)
    loaded = type(cut).from_pretrained(tmp_path)
    assert skipat_surgery.report(loaded) == skipat_surgery.report(cut)
    with pytest.raises(ValueError, match=r"loaded from a cut checkpoint.*load the model that it was made from"):
        skipat_surgery.restore(loaded)


@torch.no_grad()
def test_a_timm_model_loads_again(case: Case, tmp_path: Path) -> None:
    if not case.is_timm:
        pytest.skip(f"a model of {case.host}")
    cut, images = cut_of(case.model()).float(), case.images().float()
    save_timm(case, cut, tmp_path)
    for loaded in (
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval(),
        loading.load(str(tmp_path)).model,
    ):
        assert skipat_surgery.report(loaded).blocks == skipat_surgery.report(cut).blocks
        assert_same(case.tensors(loaded, images), case.tensors(cut, images), atol=0, rtol=0)


@torch.no_grad()
def test_a_model_that_its_user_builds_loads_again(case: Case, tmp_path: Path) -> None:
    if case.host in ("transformers", "timm"):
        pytest.skip("saves itself")
    stock, images = case.model(), case.images()
    cut = cut_of(stock)
    skipat_surgery.save(cut, tmp_path)
    loaded = skipat_surgery.load(tmp_path, stock)
    assert skipat_surgery.report(loaded).blocks == skipat_surgery.report(cut).blocks
    assert_same(case.tensors(loaded, images), case.tensors(cut, images), atol=0, rtol=0)


def save_timm(case: Case, cut: nn.Module, folder: Path) -> None:
    """Save a cut timm model with timm's own writer; the test is skipped where timm cannot save the stock one."""
    try:
        save_for_hf(case.model(), folder / "stock")
        timm.create_model(f"local-dir:{folder / 'stock'}", pretrained=True)
    except Exception as error:
        pytest.skip(f"the stock model cannot be saved so either: {error}")
    save_for_hf(cut, folder)
