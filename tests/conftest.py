"""The models that single tests use, and the shared real data."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import case_named
from torch import nn

pytest_plugins = ["contract_table"]
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture
def vit() -> nn.Module:
    return case_named("ViTForImageClassification").model()


@pytest.fixture
def timm_vit() -> nn.Module:
    return case_named("timm vit").model()


def shared(path: str) -> Path:
    """A path of the shared real data; the test is skipped where it is not there."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"{found} is not here")
    return found
