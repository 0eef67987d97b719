"""OpenVINO converts a cut model itself, traced or exported, without ONNX between: equal by value at other batches."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import openvino
import pytest
import torch
from cases import Case, case_named
from exported import openvino_core
from models import assert_same, cut_of
from torch import Tensor, nn

NAMES = ("ViTModel", "YolosModel", "DINOv3ViTModel", "timm vit")


class Tokens(nn.Module):
    def __init__(self, case: Case, model: nn.Module) -> None:
        super().__init__()
        self.case, self.model = case, model

    def forward(self, images: Tensor) -> Tensor:
        return self.case.tensors(self.model, images)[0]


def traced(model: nn.Module, images: Tensor) -> Any:
    return openvino.convert_model(model, example_input=images)


def exported(model: nn.Module, images: Tensor) -> Any:
    batch = {"images": {0: torch.export.Dim("batch")}}
    return openvino.convert_model(torch.export.export(model, (images,), dynamic_shapes=batch))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("convert", [traced, exported])
@pytest.mark.parametrize("case", map(case_named, NAMES), ids=lambda case: case.name)
@torch.no_grad()
def test_a_converted_model_gives_what_the_cut_one_gives(case: Case, convert: Callable[..., Any]) -> None:
    model = Tokens(case, cut_of(case.model()).float()).eval()
    graph = convert(model, case.images(batch=2).float())
    run = openvino_core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch in (2, 3):
        images = case.images(batch=batch, seed=1).float()
        assert_same([torch.from_numpy(run(images.numpy())[0].copy())], [model(images)], atol=1e-3, rtol=1e-3)


def test_a_signal_can_be_handled_after_models_came_and_went() -> None:
    """Where several Cores did, in another order, the process ended: see `openvino_core`."""
    images, seen = torch.zeros(1, 4), []
    graphs = [openvino.convert_model(nn.Linear(4, 2), example_input=images) for _ in range(2)]
    runs = [openvino_core().compile_model(graph, "CPU") for graph in graphs]
    del runs[0], runs[0]
    before = signal.signal(signal.SIGUSR1, lambda *args: seen.append(args[0]))
    signal.raise_signal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]
