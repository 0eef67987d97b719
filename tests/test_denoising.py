"""The denoiser that benchmarks/denoising.py measures, and one small run of that."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import shared

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import denoiser
import denoising
import training

TINY = denoiser.Shape(width=16, depth=4, heads=2, stages=((32, 2, 2), (64, 1, 1)))
WINDOWED = denoiser.WindowedShape(width=8, depths=(3,), heads=2, window=8, stages=((32, 1, 1),))


@pytest.fixture
def untrained():
    torch.manual_seed(0)
    return TINY.build().eval()


def test_a_fresh_denoiser_of_windows_changes_nothing_at_any_size():
    fresh = WINDOWED.build().eval()
    for size in ((32, 32), (48, 64), (37, 50)):
        photo = torch.rand(2, 3, *size)
        torch.testing.assert_close(denoising.restored(fresh, photo), photo, atol=1e-6, rtol=0)


def test_a_fresh_denoiser_changes_nothing_at_any_size(untrained):
    for size in ((32, 32), (48, 64), (16, 20)):
        photo = torch.rand(2, 3, *size)
        assert torch.equal(untrained(photo), photo)


def test_a_photo_that_is_no_whole_number_of_patches_comes_back_at_its_size(untrained):
    photo = torch.rand(1, 3, 37, 50)
    assert torch.equal(denoising.restored(untrained, photo), photo)


def test_a_patch_lies_where_it_lies_whatever_the_size_of_the_photo(untrained):
    small = untrained.tower.rope.get_embed((4, 6)).unflatten(0, (4, 6))
    large = untrained.tower.rope.get_embed((9, 8)).unflatten(0, (9, 8))
    assert torch.equal(small, large[:4, :6])


def test_noise_has_its_level():
    noise = denoiser.with_noise(torch.full((4, 3, 64, 64), 0.5), level=25) - 0.5
    assert abs(float(noise.std()) * 255 - 25) < 0.3
    assert abs(float(noise.mean()) * 255) < 0.3


def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    shared("data/photos")
    monkeypatch.setattr(training, "SAVED_EVERY", 1)
    whole = denoiser.trained(TINY, tmp_path / "whole.safetensors")
    taken, crops = [], denoiser.crops

    def interrupted(*args):
        taken.append(args)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return crops(*args)

    monkeypatch.setattr(denoiser, "crops", interrupted)
    with pytest.raises(KeyboardInterrupt):
        denoiser.trained(TINY, tmp_path / "again.safetensors")
    again = denoiser.trained(TINY, tmp_path / "again.safetensors")
    assert len(taken) == 4  # the third step was all that was left
    for mine, theirs in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_small_run(tmp_path):
    shared("data/denoising")
    args = denoising.Arguments(
        skip="1-2", phis="clusters, paper", merges="0.05", levels="25", sides="32", whole=0, photos=2, solve_crops=8,
        steps=2, timed="32, 64", rounds=5, output_dir=str(tmp_path),
    )  # fmt: skip
    denoising.Denoising(args, TINY).run()
    found = json.loads((tmp_path / "denoising.json").read_text())
    cuts = [f"{name}, {state}" for name in ("clusters", "paper") for state in ("solved", "distilled")]
    assert list(found) == ["untouched", *cuts, "merge 0.05"]
    assert found["merge 0.05"] != found["untouched"]
    noisy = found["untouched"]["Kodak24, σ 25, 32 px"]["psnr"]
    assert 15 < noisy < 35  # the noise alone leaves 20.2 dB
    assert "1,024" not in (tmp_path / "denoising.md").read_text()
    assert "| 64" in (tmp_path / "denoising.md").read_text()
    assert (tmp_path / "denoising.png").stat().st_size > 1000
    before = (tmp_path / "denoising.json").read_text()
    denoising.Denoising(args, TINY).run()  # goes on where it was: nothing is measured again
    assert (tmp_path / "denoising.json").read_text() == before


def test_a_small_run_with_windows(tmp_path):
    shared("data/denoising")
    args = denoising.Arguments(
        kind="windowed", skip="1-2", phis="no clusters", merges="", levels="25", sides="32", whole=0, photos=1,
        solve_crops=8, steps=1, timed="32", rounds=5, output_dir=str(tmp_path),
    )  # fmt: skip
    denoising.Denoising(args, WINDOWED).run()
    found = json.loads((tmp_path / "denoising.json").read_text())
    assert list(found) == ["untouched", "no clusters, solved", "no clusters, distilled"]
    assert "1,024" in (tmp_path / "denoising.md").read_text()  # a token for each pixel
