"""The models that single tests use, and the shared real data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import small_models
import torch
from accelerate.state import AcceleratorState, GradientState
from cases import case_named
from filelock import FileLock
from torch import nn

pytest_plugins = ["contract_table"]
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture
def vit() -> nn.Module:
    return case_named("ViTForImageClassification").model()


@pytest.fixture
def timm_vit() -> nn.Module:
    return case_named("timm vit").model()


@pytest.fixture
def fresh_process() -> Iterator[None]:
    """What a process holds once is put back after a command ran in it: accelerate's state, the number of threads."""
    threads = torch.get_num_threads()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.set_num_threads(threads)


@pytest.fixture
def exact_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' eager attention rounds its softmax to float32; here it does not."""
    monkeypatch.setattr("torch.nn.functional.softmax", small_models.softmax)


@pytest.fixture(autouse=True)
def exact_contract(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a host rounds to float32 is compared as exactly as all the rest."""
    if request.node.get_closest_marker("contract"):
        for name, function in small_models.EXACT.items():
            with suppress(ImportError):  # of a model that is newer than its host
                monkeypatch.setattr(name, function)


@pytest.fixture
def exact_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that hosts round, such as the rotation of queries and keys, are made in float64."""
    for name, function in small_models.EXACT_STEPS.items():
        monkeypatch.setattr(name, function)


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """``once(name, make)``: a folder that `make` fills, once for all workers of pytest-xdist; the others wait."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # which the workers share

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        path, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                path.mkdir()
                make(path)
                done.touch()
        return path

    return folder


def shared(path: str) -> Path:
    """A path of the shared real data; the test is skipped where it is not there."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"{found} is not here")
    return found
