"""The clips that benchmarks/moving_crops.py classifies, and one small run of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import shared

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import moving_crops


def test_a_clip_moves_over_its_photo_in_its_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving_crops, "PACES", (2.0, 2.0))
    rows, columns = torch.meshgrid(torch.arange(60.0), torch.arange(70.0), indexing="ij")
    photo = torch.stack([rows, columns, torch.zeros(60, 70)])  # each pixel says where it is
    clips, labels = moving_crops.Clips([photo], frames=4, side=16).draw(64, torch.Generator().manual_seed(0))
    assert clips.shape == (64, 4, 3, 16, 16)
    assert set(labels.tolist()) == set(range(8))
    moved = ((clips[:, 1:, :2] - clips[:, :-1, :2]) / 4).mean(dim=(1, 3, 4))  # (rows, columns) a frame
    angles = 2 * torch.pi * labels / 8
    expected = 2 * torch.stack([angles.sin(), angles.cos()], dim=1)
    torch.testing.assert_close(moved, expected, atol=0.34, rtol=0)  # places are whole pixels


def test_a_photo_too_small_for_the_way_is_left_out() -> None:
    photos = [torch.rand(3, 30, 60), torch.rand(3, 60, 60)]
    assert len(moving_crops.Clips(photos, frames=4, side=24).photos) == 1


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving_crops, "PHOTOS", 20)
    shared("data/photos")
    shared("data/discovery")
    options = {"side": 32, "frames": 4, "width": 32, "train_steps": 2, "steps": 2, "test_clips": 32, "rounds": 5}
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    moving_crops.main([*arguments, "--solve_clips", "64", "--output_dir", str(tmp_path)])
    table = (tmp_path / "moving_crops.md").read_text()
    assert table.strip() == capsys.readouterr().out.strip()
    assert table.count("solved") == table.count("distilled") == len(moving_crops.PHIS)
