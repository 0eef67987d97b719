"""`align`: its loss by value, that it trains Φ and nothing else, and that it gains on the closed form."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import case_named

import skipat_surgery
from skipat_surgery import PhiConfig
from skipat_surgery.convert.align import phi_output, repeated
from skipat_surgery.convert.losses import relative_error
from skipat_surgery.observing import z_of
from skipat_surgery.tower import Tower


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.randn(128, 3, 32, 32, dtype=torch.float64)


def test_the_loss_is_error_over_variance(images):
    found, target = torch.randn(2, 5, 7, 4).double()
    terms = []
    for tokens in (slice(0, 2), slice(2, 7)):
        y = target[:, tokens].reshape(-1, 4)
        error = ((found[:, tokens].reshape(-1, 4) - y) ** 2).sum(dim=1).mean()
        terms.append(error / ((y - y.mean(dim=0)) ** 2).sum(dim=1).mean())
    torch.testing.assert_close(relative_error(found, target, 2).mean(), (terms[0] + terms[1]) / 2)
    torch.testing.assert_close(relative_error(found[:, 2:], target[:, 2:], 0).mean(), terms[1])


@pytest.mark.parametrize("name", ["ViTForImageClassification", "YolosModel", "timm vit, registers"])
def test_what_is_trained_is_what_the_model_computes(name, images):
    case = case_named(name)
    cut = skipat_surgery.apply(case.model(), [2, 3], PhiConfig(pool=0, reads_x=False))
    tower, pixels = Tower.of(cut), case.images()
    with torch.no_grad():
        z = z_of(tower, [1, 2, 3], pixels)
        grid = tower.grid(pixels)
        chained = phi_output(tower, 3, phi_output(tower, 2, z[1], grid, z[2]), grid, z[3])
    torch.testing.assert_close(chained, z[3])


@pytest.mark.parametrize(
    ("inputs", "gain"), [({"pool": 0, "reads_x": False}, 0.005), ({"pool": 2}, 0.0)], ids=["Z alone", "all"]
)
def test_it_gains_on_the_closed_form_and_changes_nothing_but_phi(vit, images, inputs, gain):
    student = skipat_surgery.apply(copy.deepcopy(vit), [2, 3, 5], PhiConfig(expansion=1.0, **inputs))
    student.vit.layers[2].phi.expand.weight.requires_grad_(False)
    skipat_surgery.solve(student, vit, images.split(32))
    before = copy.deepcopy(student.state_dict())

    def error() -> float:
        with torch.no_grad():
            mine, theirs = (z_of(Tower.of(model), [2, 3, 5], images) for model in (student, vit))
        return float(sum(relative_error(mine[i], theirs[i], 1).mean() for i in (2, 3, 5))) / 3

    solved = error()
    result = skipat_surgery.align(student, vit, images.split(32), steps=60)
    assert result.steps == len(result.errors) == 60
    assert result.errors[-1] == pytest.approx(error(), rel=0.2)  # of the last batch of 32, before its step
    assert error() < (1 - gain) * solved  # what is there to gain on random weights: Z is all but linear in Z
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".phi." in name}
    assert not student.vit.layers[2].phi.expand.weight.requires_grad
    assert all(p.grad is None for p in (*student.parameters(), *vit.parameters()))


def test_it_stops_on_a_plateau(vit, images):
    student = skipat_surgery.apply(copy.deepcopy(vit), [2])
    result = skipat_surgery.align(student, vit, [images[:8]], steps=400, learning_rate=1e-6, patience=3)
    assert result.steps < 60


def test_batches_are_gone_through_again(vit, images):
    assert list(repeated([1, 2], 5)) == [1, 2, 1, 2, 1]
    with pytest.raises(ValueError, match="ended after 2, and could not be gone through again"):
        list(repeated(iter([1, 2]), 5))
    with pytest.raises(ValueError, match="the model is not cut"):
        skipat_surgery.align(vit, vit, [images])
