"""Contract 9: a saved model loads again, the same to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from cases import CASES, LEADS, Case
from conftest import Once
from models import assert_same, cut_of
from timm.models import save_for_hf
from transformers import AutoConfig

import skipat_surgery
from skipat_surgery.commands.loading import class_of

pytestmark = [
    pytest.mark.contract("save, load"),
    pytest.mark.parametrize("case", CASES, ids=lambda case: case.name),
]


TRANSFORMERS = [case for case in CASES if not case.is_timm]


@pytest.fixture(scope="module")
def loaded_elsewhere(once: Once, request: pytest.FixtureRequest) -> dict[str, dict[str, str]]:
    """What became of each transformers checkpoint in two new processes: one with the library and one without.

    Both load everything in one go. Empty where the outputs were the same to the bit, twice; else the traceback.
    """

    def run(root: Path) -> None:
        for case in TRANSFORMERS:
            if request.config.getoption("--leads") and case not in LEADS:
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
    if case.is_timm:
        pytest.skip("a timm model")
    failure = loaded_elsewhere[how][case.name]
    if failure and not stock_loads_again(case, tmp_path):
        pytest.skip("the stock model, saved and loaded again, gives other outputs too")
    assert failure == ""


@torch.no_grad()
def test_commands_load_a_cut_model_of_any_class(case: Case, tmp_path: Path) -> None:
    if case.is_timm:
        pytest.skip("a timm model")
    cut, images = cut_of(case.model()).float(), case.images().float()
    cut.save_pretrained(tmp_path)
    loaded = class_of(AutoConfig.from_pretrained(tmp_path)).from_pretrained(tmp_path)
    assert type(loaded) is type(cut)
    pairs = zip(case.tensors(cut, images), case.tensors(loaded, images), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs) and not stock_loads_again(case, tmp_path / "stock"):
        pytest.skip("the stock model, saved and loaded again, gives other outputs too")
    assert_same(case.tensors(loaded, images), case.tensors(cut, images), atol=0, rtol=0)


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
    if case.is_timm:
        pytest.skip("a timm model")
    cut = cut_of(case.model()).float()
    cut.save_pretrained(tmp_path)
    loaded = type(cut).from_pretrained(tmp_path)
    assert skipat_surgery.report(loaded) == skipat_surgery.report(cut)
    with pytest.raises(ValueError, match=r"loaded from a cut checkpoint.*load the model that it was made from"):
        skipat_surgery.restore(loaded)


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
