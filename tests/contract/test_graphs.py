"""Contract 3: torch.compile, torch.jit.trace, torch.export, and ONNX under two engines, each equal to eager.

torch.export makes a constant of a side of one, so that no size here gives a grid, or clusters, with one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import openvino
import pytest
import torch
from cases import LEADS, Case
from exported import openvino_core
from models import assert_same, unless_the_stock_model_fails_too
from torch import Tensor, nn

pytestmark = [pytest.mark.contract("graphs"), pytest.mark.parametrize("case", LEADS, ids=lambda case: case.name)]


CLOSE = {"atol": 1e-6, "rtol": 1e-6}  # hosts compute some steps, such as RMS norms and rope, in float32
ROUNDED = {"atol": 1e-3, "rtol": 1e-3}
# An export takes half a minute: two ways of placing patches, interpolated and rotary, go to ONNX at dynamic sizes.
AT_SIZES = ("ViTModel", "DINOv3ViTModel")
SIZES = [
    ((3, 5, 6), 2),
    ((4, 8, 5), 3),
    ((5, 7, 9), 1),
]  # the grid of a video, whose last two axes are an image's; the batch


class Tensors(nn.Module):
    """A model that takes images and returns the tensors of its output, as a graph must."""

    def __init__(self, case: Case, model: nn.Module, **flags: bool) -> None:
        super().__init__()
        self.case, self.model, self.flags = case, model, flags

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.case.tensors(self.model, images, **self.flags))


def test_compile_without_graph_breaks(case: Case) -> None:
    def check(model: nn.Module) -> None:
        torch.compiler.reset()
        images = case.images()
        named = dict(model.named_parameters())

        def outputs_and_gradients(forward: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
            model.zero_grad()
            outputs = case.tensors(forward, images)
            sum(out.square().mean() for out in outputs).backward()  # type: ignore
            return outputs, {name: weight.grad.clone() for name, weight in named.items() if weight.grad is not None}

        expected = outputs_and_gradients(model)
        found = outputs_and_gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
        assert_same(found[0], expected[0], **CLOSE)
        assert_same(found[1], expected[1], **CLOSE)

    unless_the_stock_model_fails_too(case, check)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_trace_with_gradients(case: Case) -> None:
    """torch.jit.trace checks its graph against one made without gradients."""

    def check(model: nn.Module) -> None:
        wrapped = Tensors(case, model)
        traced = torch.jit.trace(wrapped, (case.images(batch=2),))
        for size in (2, 5):
            images = case.images(batch=size, seed=1)
            assert_same(traced(images), wrapped(images), **CLOSE)

    unless_the_stock_model_fails_too(case, check)


@torch.no_grad()
def test_export_with_a_dynamic_batch(case: Case) -> None:
    def check(model: nn.Module) -> None:
        wrapped = Tensors(case, model)
        program = torch.export.export(wrapped, (case.images(batch=2),), dynamic_shapes=_dynamic(0)).module()
        for size in (2, 5):
            images = case.images(batch=size)
            assert_same(program(images), wrapped(images), **CLOSE)

    unless_the_stock_model_fails_too(case, check)


@torch.no_grad()
def test_export_with_dynamic_sizes(case: Case) -> None:
    if not case.others:
        pytest.skip("the host takes one size of image")

    def check(model: nn.Module) -> None:
        wrapped = Tensors(case, model, **case.flags)
        given = (_sized(case, *SIZES[0]),)
        program = torch.export.export(wrapped, given, dynamic_shapes=_dynamic(0, *_axes(case))).module()
        for size in SIZES:
            images = _sized(case, *size)
            assert_same(program(images), wrapped(images), **CLOSE)

    unless_the_stock_model_fails_too(case, check)


@torch.no_grad()
def test_onnx(case: Case, tmp_path: Path) -> None:
    """Under onnxruntime and OpenVINO."""
    grid = case.grid(case.images())
    at_sizes = case.name in AT_SIZES
    sizes = SIZES if at_sizes else [(grid, 2), (grid, 5)]

    def check(model: nn.Module) -> None:
        wrapped, path = Tensors(case, model.float(), **case.flags), tmp_path / "model.onnx"
        given, dynamic = (_sized(case, *sizes[0]).float(),), _dynamic(0, *(_axes(case) if at_sizes else ()))
        torch.onnx.export(wrapped, given, path, dynamo=True, dynamic_shapes=dynamic, verbose=False)
        for run in (_onnxruntime(path), _openvino(openvino_core().read_model(path))):
            for size in sizes:
                images = _sized(case, *size).float()
                assert_same(run(images), wrapped(images), **ROUNDED)

    unless_the_stock_model_fails_too(case, check)


def _dynamic(*dimensions: int) -> dict[str, dict[int, Any]]:
    return {"images": dict.fromkeys(dimensions, torch.export.Dim.AUTO)}


def _axes(case: Case) -> tuple[int, ...]:
    """The dimensions of a batch along which patches lie."""
    return (2, 3) if len(case.size) == 2 else (1, 3, 4)


def _sized(case: Case, grid: tuple[int, ...], batch: int) -> Tensor:
    return case.images(case.size_of(*grid[-len(case.size) :]), batch=batch)


def _onnxruntime(path: Path) -> Callable[[Tensor], list[Tensor]]:
    session = onnxruntime.InferenceSession(path)
    name = session.get_inputs()[0].name
    return lambda images: [torch.from_numpy(out) for out in session.run(None, {name: images.numpy()})]


def _openvino(model: openvino.Model) -> Callable[[Tensor], list[Tensor]]:
    compiled = openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: [torch.from_numpy(out.copy()) for out in compiled(images.numpy()).values()]
