"""The models that single tests use, and the shared real data."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
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
def exact_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' eager attention rounds its softmax to float32; here it does not."""
    monkeypatch.setattr("torch.nn.functional.softmax", lambda x, dim, dtype=None: x.softmax(dim))


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
