"""The benchmark of a distillation's course, on a small model in the place of the real one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from test_equal_speed import Small
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import course
import equal_speed


class Sensitive(Small):
    quality = "error"

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        return {"error": 1e3 * (model(self.test) - self.teacher(self.test)).square().mean().item()}


def test_it_measures_each_tenth_and_the_start(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(equal_speed, "Saliency", Sensitive)
    options = ["--row", "cut 2-3 of Z", "--image_size", "32", "--test_images", "4", "--solve_images", "64"]
    options += ["--images", "64", "--steps", "20", "--batch_size", "8", "--output_dir", str(tmp_path)]
    course.main(options)
    found = json.loads((tmp_path / "course.json").read_text())
    assert [point["step"] for point in found["points"]] == list(range(0, 21, 2))
    values = [point["error"] for point in found["points"]]
    assert len(set(values)) > 5  # the student changed on the way
    assert found["rate_scale"] in (1.0, 0.3, 0.1, 0.03)
    assert f"| 20 | {found['points'][-1]['seconds']} | {values[-1]:.4f} |" in capsys.readouterr().out
    assert (tmp_path / "course.png").stat().st_size > 10_000
