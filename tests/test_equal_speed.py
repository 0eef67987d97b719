"""The benchmark of quality at equal speed, on a small model in the place of the real one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skipat_surgery import PhiConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import equal_speed


class Small:
    """A subject of random weights; `measure` is asked once a row."""

    quality = "cosine"
    measured = 0

    def __init__(self, count: int, side: int, device: str = "cpu") -> None:
        torch.manual_seed(0)
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 5, "num_heads": 4, "num_classes": 7}
        self.teacher: nn.Module = timm.create_model("vit_tiny_patch16_224", **shape).eval()
        self.test = torch.randn(count, 3, side, side)

    def fitting(self, count: int) -> list[Tensor]:
        return list(torch.randn(count, 3, 32, 32).split(16))

    def images(self, count: int) -> Tensor:
        return self.test[:count]

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        Small.measured += 1
        return {"cosine": F.cosine_similarity(model(self.test), self.teacher(self.test)).mean().item()}


def test_it_measures_what_rows_say_and_goes_on_where_it_was(monkeypatch, tmp_path):
    monkeypatch.setattr(equal_speed, "Saliency", Small)
    options = ["--image_size", "32", "--test_images", "4", "--solve_images", "64", "--batch_size", "2", "--rounds", "5"]
    options += ["--output_dir", str(tmp_path)]
    equal_speed.main([*options, "--rows", "merge 2, cut 2-3 off the grid merge 1"])
    equal_speed.main([*options, "--rows", "merge 2, cut 2-3 off the grid merge 1, cut 2+3 of Z"])
    found = json.loads((tmp_path / "equal_speed.json").read_text())["rows"]
    assert list(found) == ["merge 2", "cut 2-3 off the grid merge 1", "cut 2+3 of Z"]
    assert Small.measured == 3
    assert all(0 < row["cosine"] < 1 - 1e-6 for row in found.values())
    table = (tmp_path / "equal_speed.md").read_text()
    assert f"{found['cut 2+3 of Z']['cosine']:.4f}" in table
    assert (tmp_path / "equal_speed.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match=r"--output_dir holds rows of .*'solve_images': 64"):
        equal_speed.main([*options, "--solve_images", "32"])


def test_a_row_that_says_so_is_refitted_too(monkeypatch):
    asked = []
    monkeypatch.setattr(equal_speed.skipat_surgery, "refit", lambda *args: asked.append(args))
    subject = Small(4, 32)
    plain, refitted = map(equal_speed.Row.of, ("cut 2-3 of Z", "cut 2-3 of Z refitted"))
    assert equal_speed.Row.of("cut 2-3 of Z refitted merge 1") == equal_speed.Row(refitted.phi, 1, True)
    plain.make(subject.teacher, subject.fitting(64))
    assert not asked
    model = refitted.make(subject.teacher, batches := subject.fitting(64))
    assert [*map(id, asked[0])] == [id(model), id(subject.teacher), id(batches)]


@pytest.mark.parametrize("name", ["narrow 50", "cut 2-3 of Z narrow 50", "cut 2-3 of Z narrow 50 merge 1"])
def test_a_row_that_says_so_is_narrower(name):
    subject, row = Small(4, 32), equal_speed.Row.of(name.removesuffix(" merge 1"))
    model = row.make(subject.teacher, subject.fitting(64))
    before, after = (sum(block.mlp.fc1.out_features for block in one.blocks) for one in (subject.teacher, model))
    assert after == before // 2
    assert equal_speed.Row.of(name).keep == 0.5


def test_names_of_rows():
    assert equal_speed.Row.of("narrow 75 merge 8") == equal_speed.Row({}, 8, keep=0.75)
    assert equal_speed.Row.of("cut 1 narrow 60").kind == "cut and narrow"
    assert equal_speed.Row.of("merge 8") == equal_speed.Row({}, 8)
    assert equal_speed.Row.of("cut 1+3-4") == equal_speed.Row(dict.fromkeys((1, 3, 4), PhiConfig()), 0)
    off = PhiConfig(pool=4, kernel_size=1)
    assert equal_speed.Row.of("cut 1 off the grid merge 2") == equal_speed.Row({1: off}, 2)
    asking = PhiConfig(expansion=0.125, queries="patches")
    assert equal_speed.Row.of("cut 1 asking and 3") == equal_speed.Row({1: asking, 3: PhiConfig()}, 0)
    for name in ("", "merge", "cut", "cut 3-8 of Y", "merge 8 cut 3-8"):
        with pytest.raises(ValueError, match="--rows takes rows such as 'merge 8'"):
            equal_speed.Row.of(name)
