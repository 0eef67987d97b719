"""The benchmark of engines, on a small model in the place of the real one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_equal_speed import Small
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import engines
import equal_speed


class Named(nn.Module):
    """A timm model whose output has a name, as transformers' has."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(images))


class SmallNamed(Small):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = Named(self.teacher)

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        return {"cosine": F.cosine_similarity(model(self.test).logits, self.teacher(self.test).logits).mean().item()}


def test_engines_give_what_eager_gives_and_graphs_are_counted(monkeypatch, tmp_path):
    monkeypatch.setattr(equal_speed, "Saliency", SmallNamed)
    options = [
        "--image_size",
        "32",
        "--test_images",
        "3",
        "--solve_images",
        "64",
        "--batch_sizes",
        "2",
        "--rounds",
        "5",
    ]
    options += [
        "--rows",
        "cut 2-3, merge 2",
        "--engines",
        "eager fp32, onnxruntime fp32, openvino fp32",
        "--rounds",
        "5",
    ]
    engines.main([*options, "--output_dir", str(tmp_path)])
    rows = json.loads((tmp_path / "engines.json").read_text())["rows"]
    measured = [row for row in rows if "engine" in row]
    assert {(row["engine"], row["name"]) for row in measured} == {
        (engine, name)
        for engine in ("eager fp32", "onnxruntime fp32", "openvino fp32")
        for name in ("untouched", "cut 2-3", "merge 2", "limit")
    }
    assert all(row["difference"] < 1e-4 for row in measured if row["name"] != "limit")
    quality = {(row["engine"], row["name"]): row["quality"]["cosine"] for row in measured if "quality" in row}
    for name in ("untouched", "cut 2-3", "merge 2"):
        assert quality["openvino fp32", name] == pytest.approx(quality["eager fp32", name], abs=1e-4)
    nodes = {row["name"]: row["nodes"] for row in rows if "nodes" in row}
    assert nodes["merge 2"]["TopK"] > 0
    assert "TopK" not in nodes["cut 2-3"]


def test_an_engine_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"--engines takes eager fp32, .*; got tensorrt"):
        engines.main(["--engines", "tensorrt"])
