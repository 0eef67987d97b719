"""Contract 6: DDP, FSDP2 and accelerate's device_map."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import mkdtemp

import accelerate
import processes
import pytest
import torch
from cases import LEADS, Case
from conftest import Once
from models import assert_same, cases_that_use, unless_the_stock_model_fails_too
from torch import nn

pytestmark = [
    pytest.mark.contract("distributed"),
    pytest.mark.parametrize("case", LEADS, ids=lambda case: case.name),
]


@pytest.fixture(scope="module")
def results(once: Once, request: pytest.FixtureRequest) -> dict[str, str]:
    """What two processes found, by check and case; empty where all was well. They start once, for all families."""

    def run(folder: Path) -> None:
        names = [case.name for case in cases_that_use(request)]
        torch.multiprocessing.spawn(processes.run, args=(str(folder), names), nprocs=2)

    return json.loads((once("distributed", run) / "results.json").read_text())


def passed(result: str) -> None:
    if result.startswith("the stock model"):
        pytest.skip(result)
    assert result == ""


def test_three_steps_under_ddp_equal_one_process_with_the_joint_batch(case: Case, results: dict[str, str]) -> None:
    passed(results[f"data_parallel {case.name}"])


def test_fsdp2_with_checkpointing_equals_the_plain_model(case: Case, results: dict[str, str]) -> None:
    passed(results[f"fully_sharded {case.name}"])


@torch.no_grad()
def test_a_model_dispatched_over_devices_gives_the_same(case: Case, tmp_path: Path) -> None:
    def check(model: nn.Module) -> None:
        images = case.images()
        expected = case.tensors(model, images)
        away = tuple(case.block(index) for index in (1, 2, 4, 5))
        inside = tuple(f"{block}." for block in away)
        device_map = {name: "cpu" for name, _ in model.named_parameters() if not name.startswith(inside)}
        device_map |= dict.fromkeys(away, "disk")
        accelerate.dispatch_model(
            model, device_map, main_device="cpu", offload_dir=mkdtemp(dir=tmp_path), force_hooks=True
        )
        assert any(parameter.is_meta for parameter in model.parameters())  # that part is on the disk
        assert_same(case.tensors(model, images), expected, atol=1e-12, rtol=1e-9)

    unless_the_stock_model_fails_too(case, check)
