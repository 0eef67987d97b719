"""What benchmarks/scale.py counts on paper, against a model that is really there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm

import skipat_surgery
from skipat_surgery import PhiConfig
from skipat_surgery.convert.optimizers import freeze_untouched

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import scale


def test_a_small_model_is_counted_as_it_is():
    name = "vit_tiny_patch16_224"
    args = scale.Arguments(batch_size=8, images=8 * 64 * 10, tflops=1e-3, bandwidth=1e-3)
    student = timm.create_model(name, num_classes=0)
    untouched = sum(parameter.numel() for parameter in student.parameters())
    skipat_surgery.apply(student, range(6, 9), PhiConfig(pool=0, prefix="mix"))
    freeze_untouched(student)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    matrices = sum(parameter.numel() for parameter in trained if parameter.ndim == 2)
    held = 4 * (untouched + sum(parameter.numel() for parameter in student.parameters()) + count)
    held += 4 * matrices + 8 * (count - matrices)
    kept = 34 * 8 * 197 * 192 * 6
    name_, parameters, trained_, tokens, memory, step, _, _, sending, hours = scale.row_of(name, args)
    assert (name_, parameters, trained_, tokens) == (name, "6 M", f"{count / 1e6:,.0f} M", "197")
    assert memory == f"{held / 1e9:.1f} + {kept / 1e9:.1f} GB"
    assert sending == f"{2 * 4 * count * 63 / 64 / 1e6:.2f} s"
    seconds = float(step.split()[0]) + float(sending.split()[0])
    assert float(hours.split()[0]) == pytest.approx(10 * seconds / 3600, abs=0.06)
    block, mlp, patches = 12 * 197 * 192**2 + 2 * 197**2 * 192, 8 * 197 * 192**2, 196 * 768 * 192  # MACs
    least = 12 * block + patches + 3 * (3 * block + 3 * mlp)  # teacher, student, and twice as much backward
    assert 16 * least / 1e9 < float(step.split()[0]) < 16 * (least + 9 * 0.25 * (block - mlp)) / 1e9  # by little for Φ
