"""`solve` against numpy's least squares, and on a map that Φ can represent exactly."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from cases import case_named

import skipat_surgery
from skipat_surgery import PhiConfig
from skipat_surgery.observing import z_of
from skipat_surgery.tower import Tower


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.randn(128, 3, 32, 32, dtype=torch.float64)


def lstsq(x: np.ndarray, y: np.ndarray) -> float:
    """Squared error over variance of the affine least-squares fit."""
    ones = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    fitted = ones @ np.linalg.lstsq(ones, y, rcond=None)[0]
    return float(((y - fitted) ** 2).sum() / ((y - y.mean(axis=0)) ** 2).sum())


def test_errors_equal_numpys_least_squares(vit, images):
    student = skipat_surgery.apply(
        copy.deepcopy(vit), [2], PhiConfig(expansion=1.0, prefix="mix", pool=0, reads_x=False)
    )
    result = skipat_surgery.solve(student, vit, images.split(50), ridge=0.0)
    with torch.no_grad():
        z = {i: value.numpy() for i, value in z_of(Tower.of(vit), [1, 2], images).items()}
    width = z[1].shape[-1]
    patches = {i: value[:, 1:].reshape(-1, width) for i, value in z.items()}
    features = np.concatenate([z[1][:, 0], z[1][:, 1:].mean(axis=1)], axis=1)
    assert result.images == 128
    assert result.patches[2] == pytest.approx(lstsq(patches[1], patches[2]), rel=1e-9)
    assert result.prefix[2] == pytest.approx(lstsq(features, z[2][:, 0]), rel=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("expansion", [1.0, 0.5, 0.25])
@pytest.mark.parametrize(
    "inputs", [{"pool": 0, "reads_x": False}, {"pool": 0, "reads_x": True}, {"pool": 2}, {"pool": 3}]
)
def test_the_written_phi_has_the_reported_error(vit, images, expansion, inputs):
    student = skipat_surgery.apply(
        copy.deepcopy(vit), [2, 3, 5], PhiConfig(expansion=expansion, prefix="mix", **inputs)
    )
    result = skipat_surgery.solve(student, vit, images.split(50))
    mine, theirs = (z_of(Tower.of(model), [2, 3, 5], images) for model in (student, vit))
    for block in (2, 3, 5):
        for tokens, reported in [(slice(1, None), result.patches), (slice(0, 1), result.prefix)]:
            error = (mine[block] - theirs[block])[:, tokens].square().sum()
            target = theirs[block][:, tokens].flatten(0, 1)
            spread = (target - target.mean(dim=0)).square().sum()
            # GELU is linear to about 1e-3 only where the shifted units lie.
            assert float(error / spread) == pytest.approx(reported[block], abs=0.02)


def test_solving_beats_a_fresh_phi(vit, images):
    student = skipat_surgery.apply(copy.deepcopy(vit), [2, 3])
    with torch.no_grad():
        stock, fresh = vit(images).logits, student(images).logits
        skipat_surgery.solve(student, vit, images.split(50))
        solved = student(images).logits
    assert (solved - stock).square().mean() < 0.7 * (fresh - stock).square().mean()


@torch.no_grad()
def test_prefix_tokens_that_attend_need_no_fit(vit, images):
    """Where the first Φ of a run attends, and where a later one maps what that gave."""
    mixes = PhiConfig(prefix="mix", pool=0, reads_x=False)
    phis = {2: PhiConfig(), 3: mixes, 4: mixes}
    student = skipat_surgery.apply(copy.deepcopy(vit), phis)
    result = skipat_surgery.solve(student, vit, images.split(50))
    assert result.prefix.keys() == {3, 4}
    mine, theirs = (z_of(Tower.of(model), [2, 3, 4], images) for model in (student, vit))
    for block, reported in result.prefix.items():
        target = theirs[block][:, 0]
        error = (mine[block][:, 0] - target).square().sum() / (target - target.mean(dim=0)).square().sum()
        assert float(error) == pytest.approx(reported, abs=0.02)
    # Z of the class token is the MSA's, on hidden states that differ in nothing before the run.
    assert torch.allclose(mine[2][:, 0], theirs[2][:, 0], atol=1e-10, rtol=0)


def test_modes_and_gradients_are_left_alone(vit, images):
    student = skipat_surgery.apply(copy.deepcopy(vit), [2]).train()
    skipat_surgery.solve(student, vit, [images])
    assert all(module.training for module in student.modules())
    assert not vit.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("ridge", [0.0, 1e-4])
def test_images_that_determine_no_fit_are_refused(vit, images, ridge):
    student = skipat_surgery.apply(copy.deepcopy(vit), [2])
    before = copy.deepcopy(student.state_dict())
    alike = images[:1].expand(128, -1, -1, -1) if ridge == 0.0 else torch.full_like(images, float("nan"))
    with pytest.raises(ValueError, match=r"singular"):
        skipat_surgery.solve(student, vit, [alike], ridge=ridge)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_bad_input(vit, images):
    student = skipat_surgery.apply(copy.deepcopy(vit), [2, 4], PhiConfig(prefix="mix", pool=0))
    with pytest.raises(ValueError, match=r"8 images are too few to solve Φ of width 32: give at least 65"):
        skipat_surgery.solve(student, vit, [images[:8]])
    with pytest.raises(ValueError, match="the model is not cut"):
        skipat_surgery.solve(vit, vit, [images])
    with pytest.raises(ValueError, match="the teacher is cut; it must be the untouched model"):
        skipat_surgery.solve(student, student, [images])


def test_batches_may_be_pairs_in_lists_and_empty(vit, images):
    """A batch whose images were all corrupt is left out."""
    found = []
    for batches in (images.split(50), [[part, [0] * len(part)] for part in (*images.split(50), images[:0])]):
        student = skipat_surgery.apply(copy.deepcopy(vit), [2])
        found.append((skipat_surgery.solve(student, vit, batches), student.state_dict()))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(weight, found[1][1][name]) for name, weight in found[0][1].items())


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x[0], 0), lambda x: [list(x)]])
def test_one_batch_is_no_list_of_batches(wrap, vit, images):
    student = skipat_surgery.apply(copy.deepcopy(vit), [2])
    with pytest.raises(TypeError, match=r"got images \(3, 32, 32\); what goes through them is a list of batches"):
        skipat_surgery.solve(student, vit, wrap(images))


def test_spectrograms_come_by_name(images):
    model = case_named("ASTModel").model()
    student = skipat_surgery.apply(copy.deepcopy(model), [2, 3])
    batches = [{"input_values": part[:, 0, :, :20]} for part in images.split(32)]  # 32 times, 20 frequencies
    fresh = [batch["input_values"] for batch in batches]
    with torch.no_grad():
        before = (student(fresh[0])[0] - model(fresh[0])[0]).square().mean()
        result = skipat_surgery.solve(student, model, batches, progress=False)
        after = (student(fresh[0])[0] - model(fresh[0])[0]).square().mean()
    assert result.images == 128
    assert after < before
