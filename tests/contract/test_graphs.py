"""Contract 3: torch.compile, torch.export and ONNX, each equal to eager."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from cases import LEADS, Case
from models import assert_same, unless_the_stock_model_fails_too
from torch import Tensor, nn

pytestmark = [pytest.mark.contract("graphs"), pytest.mark.parametrize("case", LEADS, ids=lambda case: case.name)]


CLOSE = {"atol": 1e-6, "rtol": 1e-6}  # hosts compute some steps, such as RMS norms and rope, in float32


class Tensors(nn.Module):
    """A model that takes images and returns the tensors of its output, as a graph must."""

    def __init__(self, case: Case, model: nn.Module) -> None:
        super().__init__()
        self.case, self.model = case, model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.case.tensors(self.model, images))


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


@torch.no_grad()
def test_export_with_a_dynamic_batch(case: Case) -> None:
    def check(model: nn.Module) -> None:
        wrapped = Tensors(case, model)
        batch = {"images": {0: torch.export.Dim("batch")}}
        program = torch.export.export(wrapped, (case.images(batch=2),), dynamic_shapes=batch).module()
        for size in (2, 5):
            images = case.images(batch=size)
            assert_same(program(images), wrapped(images), **CLOSE)

    unless_the_stock_model_fails_too(case, check)


@torch.no_grad()
def test_onnx(case: Case, tmp_path: Path) -> None:
    def check(model: nn.Module) -> None:
        wrapped = Tensors(case, model.float())
        batch = {"images": {0: torch.export.Dim("batch")}}
        images = case.images(batch=2).float()
        path = tmp_path / "model.onnx"
        torch.onnx.export(wrapped, (images,), path, dynamo=True, dynamic_shapes=batch, verbose=False)
        session = onnxruntime.InferenceSession(path)
        for size in (2, 5):
            images = case.images(batch=size).float()
            found = session.run(None, {session.get_inputs()[0].name: images.numpy()})
            assert_same([torch.from_numpy(out) for out in found], wrapped(images), atol=1e-3, rtol=1e-3)

    unless_the_stock_model_fails_too(case, check)
