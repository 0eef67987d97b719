"""Small models of every supported family, built from configs with random weights, and the shared real data."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

SHARED = Path(__file__).parents[2] / "shared"
DEPTH = 6
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}


@dataclass(frozen=True)
class Case:
    """A model to test on: how to build it, and where its parts are."""

    name: str
    build: Callable[[], nn.Module]
    tower: str
    num_prefix_tokens: int
    patch_size: int = 8
    other_size: Callable[[nn.Module, Tensor], object] | None = None  # a forward at a size that is not configured

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.build().double().eval()
        # LayerScale and position embeddings start near zero; random ones let every path matter.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    def images(self, height: int = 32, width: int = 32, batch: int = 2) -> Tensor:
        return torch.randn(batch, 3, height, width, dtype=torch.float64)


def _timm(name: str, **kwargs: object) -> Callable[[], nn.Module]:
    shape = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": DEPTH,
        "num_heads": 4,
        "mlp_ratio": 1.5,
    }
    return lambda: timm.create_model(name, num_classes=5, **{**shape, **kwargs})


def _hf(model: str, config: str, **kwargs: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        settings = getattr(transformers, config)(**SHAPE, num_labels=5, encoder_stride=8, **kwargs)
        return getattr(transformers, model)(settings)

    return build


def _interpolated(model: nn.Module, images: Tensor) -> object:
    return model(images, interpolate_pos_encoding=True)


def _direct(model: nn.Module, images: Tensor) -> object:
    return model(images)


CASES = [
    Case("ViTModel", _hf("ViTModel", "ViTConfig"), "", 1, other_size=_interpolated),
    Case(
        "ViTForImageClassification",
        _hf("ViTForImageClassification", "ViTConfig"),
        "vit",
        1,
        other_size=_interpolated,
    ),
    Case("ViTForMaskedImageModeling", _hf("ViTForMaskedImageModeling", "ViTConfig"), "vit", 1),
    Case("DeiTModel", _hf("DeiTModel", "DeiTConfig"), "", 2, other_size=_interpolated),
    Case(
        "DeiTForImageClassification",
        _hf("DeiTForImageClassification", "DeiTConfig"),
        "deit",
        2,
        other_size=_interpolated,
    ),
    Case(
        "DeiTForImageClassificationWithTeacher",
        _hf("DeiTForImageClassificationWithTeacher", "DeiTConfig"),
        "deit",
        2,
        other_size=_interpolated,
    ),
    Case("DeiTForMaskedImageModeling", _hf("DeiTForMaskedImageModeling", "DeiTConfig"), "deit", 2),
    Case("timm vit", _timm("vit_tiny_patch16_224"), "", 1),
    Case(
        "timm vit, dynamic size",
        _timm("vit_tiny_patch16_224", dynamic_img_size=True),
        "",
        1,
        other_size=_direct,
    ),
    Case("timm vit, registers", _timm("vit_small_patch14_reg4_dinov2", init_values=0.1), "", 5),
    Case("timm vit, LayerScale", _timm("vit_tiny_patch16_224", init_values=0.1), "", 1),
    Case("timm vit, pre-norm", _timm("vit_base_patch32_clip_224"), "", 1),
    Case("timm vit, average pool", _timm("vit_tiny_patch16_224", global_pool="avg", class_token=False), "", 0),
    Case("timm deit distilled", _timm("deit_tiny_distilled_patch16_224"), "", 2),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def vit() -> nn.Module:
    return next(case for case in CASES if case.name == "ViTForImageClassification").model()


@pytest.fixture
def timm_vit() -> nn.Module:
    return next(case for case in CASES if case.name == "timm vit").model()


def shared(path: str) -> Path:
    """A path of the shared real data; the test is skipped where it is not there."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"{found} is not here")
    return found


def output_tensors(output: object) -> list[Tensor]:
    """Every tensor in a model's output, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = tuple(output.values())
    return [tensor for item in output for tensor in output_tensors(item)] if isinstance(output, (tuple, list)) else []
