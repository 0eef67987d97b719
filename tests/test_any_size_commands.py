"""The commands on models whose images have a grid each: each is read at its own size, as the processor gives it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from cases import case_named

from skipat_surgery.commands import benchmark, convert, loading
from skipat_surgery.commands.benchmark import Benchmark

pytestmark = pytest.mark.usefixtures("fresh_process")
ANY_SIZE = ("Siglip2ForImageClassification", "Qwen2VLForConditionalGeneration", "PixtralVisionModel")
SHORT = ["--skip", "2-3", "--dtypes", "fp32", "--rounds", "5", "--batch_size", "2", "--memory", "false"]


@pytest.mark.parametrize("name", ANY_SIZE)
def test_a_benchmark_gives_images_of_the_sizes_that_are_asked_for(name, tmp_path):
    case_named(name).build().save_pretrained(tmp_path / "model")
    given = ["--model", str(tmp_path / "model"), "--image_sizes", "32,64", "--output_dir", str(tmp_path / "out")]
    benchmark.main([*given, *SHORT])
    tables = json.loads((tmp_path / "out" / "benchmark.json").read_text())["tables"]
    small, large = (table["rows"][0]["gflops"] for table in tables)
    assert large > 3.9 * small  # there are four times as many patches


@pytest.mark.parametrize(("name", "sides"), zip(ANY_SIZE, (7, 3, 7), strict=True))
def test_a_benchmark_refuses_a_size_before_it_begins(name, sides, tmp_path):
    case_named(name).build().save_pretrained(tmp_path / "model")
    given = ["--model", str(tmp_path / "model"), "--image_sizes", f"32,{sides}", "--output_dir", str(tmp_path / "out")]
    parsed = benchmark.parse((benchmark.Arguments,), [*given, *SHORT], "")
    with pytest.raises(ValueError, match=rf"--image_sizes names {sides}, but .* takes images of .* 0×0 patches"):
        Benchmark(*parsed)
    assert not (tmp_path / "out").exists()


def test_a_size_that_a_model_cannot_be_configured_for_is_refused(monkeypatch, tmp_path):
    """One whose configuration names its size otherwise, so that nothing would come of the option."""
    case_named("ViTModel").build().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(benchmark.loading, "set_image_size", lambda config, image_size: None)
    given = ["--model", str(tmp_path / "model"), "--image_sizes", "64", "--output_dir", str(tmp_path / "out")]
    parsed = benchmark.parse((benchmark.Arguments,), [*given, *SHORT], "")
    with pytest.raises(ValueError, match="names 64, but ViTModel then takes images of 32 × 32, 4×4 patches"):
        Benchmark(*parsed)


SIZES = ((20, 24), (24, 12), (12, 24), (16, 16), (28, 20))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of pictures of different sizes."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(100):
        size = (*SIZES[number % len(SIZES)], 3)
        PIL.Image.fromarray(draw.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


PROCESSORS = {
    "Qwen2VLForConditionalGeneration": lambda: transformers.Qwen2VLImageProcessor(
        patch_size=2, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
    ),
    "Siglip2ForImageClassification": lambda: transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16),
}


def saved(name: str, folder: Path) -> str:
    """A model with its processor."""
    torch.manual_seed(0)
    model = case_named(name).build()
    loading.from_transformers(model, PROCESSORS[name]()).save(model, folder)
    return str(folder)


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_folder_of_pictures_of_any_size_is_converted(name, pictures, tmp_path, capfd):
    given = {
        "images": pictures,
        "output_dir": tmp_path / "run",
        "n_skip": 2,
        "num_images": 100,
        "expansions": 0.25,
        "max_run": 2,
        "solve_images": 64,
        "max_steps": 2,
        "eval_images": 8,
        "batch_size": 25,
        "cka": True,
    }
    model = saved(name, tmp_path / "model")
    convert.main([model] + [str(part) for key, value in given.items() for part in (f"--{key}", value)])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["reload_difference"] < 1e-5
    assert results["best"]["figures"]["images"] + results["best"]["figures"]["corrupt"] > 0
    assert "WARNING" not in capfd.readouterr().out
    analysis = json.loads((tmp_path / "run" / "analysis.json").read_text())
    assert len(analysis["cka"]["msa"]) == 6
