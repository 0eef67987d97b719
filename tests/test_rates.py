"""`probe`: the largest scale of the rates at which the first steps lose nothing, on a loss whose answer is known."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from skipat_surgery.convert.rates import SCALES, probe


def half_square(model: nn.Linear, target: float):
    """½ (w - target)² of one weight, whatever the batch: gradient descent overshoots beyond a rate of 2."""
    return lambda batch: 0.5 * (model.weight - target).square().sum()


@pytest.mark.parametrize(("rate", "expected"), [(0.5, 1.0), (5.3, 0.3), (17.7, 0.1), (1000.0, 0.03)])
def test_it_finds_the_largest_scale_that_gains(rate, expected):
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    before = copy.deepcopy(model.state_dict())

    def make(scale: float) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(model.parameters(), lr=scale * rate)]

    assert probe(model, half_square(model, 1.0), make, [None] * 4, max_grad_norm=1e9) == expected
    assert expected in SCALES
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
