"""The script of all that is measured on a GPU, on a CPU and a small model; and the floors that it measures against."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import timm
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu
from floors import Rates, Work


def test_the_work_of_a_linear_layer():
    """4 images of 3 tokens, 5 to 7 features: 2·4·3·5·7 operations."""
    layer, tokens = nn.Linear(5, 7, bias=False), torch.randn(4, 3, 5)
    work = Work.of(layer, tokens)
    assert work.flops == 2 * 4 * 3 * 5 * 7
    assert work.needed == 4 * (5 * 7 + 4 * 3 * 5 + 4 * 3 * 7)
    assert work.traffic == work.needed  # one operation, and views


def test_what_is_not_fused_moves_more():
    two = nn.Sequential(nn.ReLU(), nn.ReLU())
    work = Work.of(two, torch.randn(10))
    assert (work.needed, work.traffic) == (2 * 40, 4 * 40)
    assert work.floor(Rates(1.0, 10.0)) == 8
    assert work.eager_floor(Rates(1.0, 10.0)) == 16


def test_rates_are_measured():
    rates = Rates.measured(torch.device("cpu"), torch.float32, side=64, rounds=3)
    assert rates.flops > 0
    assert rates.bandwidth > 0


def test_everything_is_measured_and_what_is_left_out_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "in_every_mode", lambda eager, device: eager)
    options = ["--device", "cpu", "--dtype", "fp32", "--image_sizes", "32", "--quality", "false", "--rounds", "5"]
    options += ["--models", "timm/test_vit", "--output_dir", str(tmp_path)]
    gpu.main([*options, "--batch_sizes", "1,2"])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [table["title"] for table in found["forward"]] == [f"timm/test_vit, 32 px, batch {n}" for n in (1, 2)]
    assert [table["title"] for table in found["training"]] == [f"timm/test_vit, 32 px, batch {n}" for n in (1, 2)]
    assert {row["name"] for row in found["forward"][0]["rows"]} == {"untouched", "cut", "cut of Z", "limit"}
    assert found["left out"] == []
    assert "times its floor" in (tmp_path / "gpu.md").read_text()
    gpu.main([*options, "--batch_sizes", "1", "--minutes", "0"])
    (line,) = json.loads((tmp_path / "gpu.json").read_text())["left out"]
    assert line == "timm/test_vit, 32 px, batch 1: TimeoutError, the time was up"


def test_cuts_and_their_limit_are_measured_compiled_too():
    model = timm.create_model("test_vit", img_size=32)
    found = gpu.in_every_mode(gpu.line_up_of(model), torch.device("cpu"))
    assert {(rival.name, rival.mode) for rival in found} == {
        (name, mode) for name in ("untouched", "cut", "cut of Z", "limit") for mode in ("eager", "compiled")
    }
