"""Muon takes the steps of its paper in float32 where a device has no bfloat16, and torch's own where it has."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from skipat_surgery.convert import muon
from skipat_surgery.convert.muon import Muon, orthogonalised

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_the_singular_values_are_iterated_and_the_vectors_stay(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = COEFFICIENTS[0] * s + COEFFICIENTS[1] * s**3 + COEFFICIENTS[2] * s**5
    found = orthogonalised(matrix, COEFFICIENTS, 5)
    torch.testing.assert_close(found.double(), u * s @ vh, rtol=0, atol=1e-5)


def test_the_steps_are_those_of_torch_in_float32(monkeypatch):
    def after_four_steps(has_bf16: bool) -> tuple[list[torch.Tensor], dict, list]:
        monkeypatch.setattr(muon, "multiplies_bf16", lambda device: has_bf16)
        draws = torch.Generator().manual_seed(1)
        weights = [nn.Parameter(torch.randn(shape, generator=draws)) for shape in [(24, 48), (48, 24), (2, 2)]]
        optimizer = Muon(weights, lr=0.1, weight_decay=0.01)
        for _ in range(4):
            for weight in weights[:2]:  # the third has no gradient
                weight.grad = torch.randn(weight.shape, generator=draws)
            optimizer.step()
        state = optimizer.state_dict()
        return [weight.detach() for weight in weights], state["state"], state["param_groups"]

    found = after_four_steps(False)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # by which torch's own goes to bfloat16
    expected = after_four_steps(True)
    torch.testing.assert_close(found[:2], expected[:2])
    assert found[2] == expected[2]


def test_a_closure_is_called_with_gradients(monkeypatch):
    monkeypatch.setattr(muon, "multiplies_bf16", lambda device: False)
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = Muon([weight], lr=0.1, weight_decay=0.0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 16
    assert float(weight.square().sum()) < 16
