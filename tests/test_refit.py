"""`refit`: its regression against a plain one, what it changes, and what it leaves alone."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable

import pytest
import torch
from cases import case_named

import skipat_surgery
from skipat_surgery.convert import refit as module
from skipat_surgery.convert.moments import Moments
from skipat_surgery.observing import states_of
from skipat_surgery.tower import Tower


def solved(name: str, batches):
    teacher = case_named(name).model()
    student = skipat_surgery.apply(copy.deepcopy(teacher), [2, 3])
    skipat_surgery.solve(student, teacher, batches, progress=False)
    return student, teacher


@pytest.fixture
def batches():
    torch.manual_seed(0)
    first, third, fourth = torch.randn(120, 3, 32, 32, dtype=torch.float64).split(40)
    return [first, first, third, fourth]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "fc2", "scale"),
    [
        ("ViTForImageClassification", "vit.layers.2.mlp.fc2", None),
        ("timm vit, registers", "blocks.2.mlp.fc2", "blocks.2.ls2.gamma"),
        ("Dinov2Model", "encoder.layer.2.mlp.fc2", "encoder.layer.2.layer_scale2.lambda1"),
    ],
)
def test_the_first_block_equals_a_plain_ridge_regression(name, fc2, scale, batches, monkeypatch):
    student, teacher = solved(name, batches)
    start, gamma = copy.deepcopy(student), 1.0 if scale is None else student.get_parameter(scale)
    fitting = torch.cat([batches[index] for index in (0, 2, 3)])
    inputs = []
    hook = start.get_submodule(fc2).register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    missing = (states_of(Tower.of(teacher), 2, fitting) - states_of(Tower.of(start), 2, fitting)) / gamma
    hook.remove()
    count = Tower.of(start).num_special_tokens

    def rows(x):
        return torch.cat([x[:, count:].flatten(0, 1), *[x[:, :count].flatten(0, 1)] * 8])

    h, y = rows(inputs[0]), rows(missing)
    centred, spread = h - h.mean(dim=0), y - y.mean(dim=0)
    covariance = centred.T @ centred / len(h)
    damped = covariance + 1e-2 * covariance.trace() / len(covariance) * torch.eye(len(covariance), dtype=h.dtype)
    change = torch.linalg.solve(damped, centred.T @ spread / len(h)).T
    errors = itertools.count()
    monkeypatch.setattr(module._Block, "error", lambda self: -next(errors))  # every map is taken to gain
    skipat_surgery.refit(student, teacher, batches, ridge=1e-2, progress=False)
    before, found = start.get_submodule(fc2), student.get_submodule(fc2)
    torch.testing.assert_close(found.weight, before.weight + change, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(found.bias, before.bias + y.mean(dim=0) - change @ h.mean(dim=0), atol=1e-8, rtol=1e-6)


def changed_by_refit(student, teacher, batches) -> set[str]:
    before = copy.deepcopy(student.state_dict())
    skipat_surgery.refit(student, teacher, batches, progress=False)
    return {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}


def maps(msa: str, mlp: str, whole: Iterable[int], blocks: Iterable[int]) -> set[str]:
    """The names of W_o in blocks whose MSA is whole, and of the last maps of MLPs."""
    paths = [*map(msa.format, whole), *map(mlp.format, blocks)]
    return {f"{path}.{part}" for path in paths for part in ("weight", "bias")}


def test_it_gains_and_changes_nothing_but_those_maps(batches):
    student, teacher = solved("ViTForImageClassification", batches)
    before = copy.deepcopy(student.state_dict())
    result = skipat_surgery.refit(student, teacher, batches, progress=False)
    assert result.images == (120, 40)
    assert list(result.before) == [2, 3, 4, 5]
    assert all(result.after[block] <= result.before[block] for block in result.before)
    assert result.after[5] < result.before[5]
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed <= maps("vit.layers.{}.attention.o_proj", "vit.layers.{}.mlp.fc2", (4, 5), (2, 3, 4, 5))
    assert "error over variance of X on 40 others" in str(result)


def test_each_map_takes_the_ridge_that_is_best_on_held_out_images(batches):
    student, teacher = solved("ViTForImageClassification", batches)
    with torch.no_grad():  # something to gain
        weight = student.vit.layers[2].mlp.fc2.weight
        weight += weight.std() * torch.randn(weight.shape, dtype=weight.dtype)
    alone = {}
    for ridge in (1e-4, 1e-2, 1.0):
        copied = copy.deepcopy(student)
        alone[ridge] = skipat_surgery.refit(copied, teacher, batches, ridge=ridge, progress=False).after[2], copied
    assert len({error for error, _ in alone.values()}) > 1
    best, expected = min(alone.values(), key=lambda pair: pair[0])
    result = skipat_surgery.refit(student, teacher, batches, ridge=list(alone), progress=False)
    assert result.after[2] == best
    assert torch.equal(student.vit.layers[2].mlp.fc2.weight, expected.vit.layers[2].mlp.fc2.weight)


def test_a_map_that_gains_nothing_keeps_its_weights(batches, monkeypatch):
    student, teacher = solved("ViTForImageClassification", batches)
    monkeypatch.setattr(Moments, "ridge_regression", lambda self, *args, **kwargs: torch.ones_like(self.xy.T))
    assert not changed_by_refit(student, teacher, batches)


def test_the_mlps_of_post_norm_blocks_are_left_alone(batches):
    changed = changed_by_refit(*solved("timm vit, res-post", batches), batches)
    assert changed <= maps("blocks.{}.attn.proj", "", (4, 5), ())


def test_a_map_that_is_used_elsewhere_is_left_alone(batches):
    student, teacher = solved("ViTForImageClassification", batches)
    student.vit.layers[4].mlp.fc2 = student.vit.layers[5].mlp.fc2
    changed = changed_by_refit(student, teacher, batches)
    assert not changed & maps("", "vit.layers.{}.mlp.fc2", (), (4, 5))


def test_bad_input(batches):
    student, teacher = solved("ViTForImageClassification", batches)
    with pytest.raises(ValueError, match=r"needs images to fit.*given \(40, 0\).*at least two batches"):
        skipat_surgery.refit(student, teacher, batches[:1])
    with pytest.raises(ValueError, match="not cut"):
        skipat_surgery.refit(teacher, teacher, batches)
    for ridge in (-1.0, ()):
        with pytest.raises(ValueError, match="ridge must be a number from 0 on"):
            skipat_surgery.refit(student, teacher, batches, ridge=ridge)


def test_it_ends_before_the_blocks_that_see_queries():
    model = case_named("EomtForUniversalSegmentation").model()
    images = torch.randn(64, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).split(8)
    student = skipat_surgery.apply(copy.deepcopy(model), [2, 3])
    skipat_surgery.solve(student, model, images, progress=False)
    result = skipat_surgery.refit(student, model, images, progress=False)
    assert sorted(result.after) == [2, 3, 4, 5]  # of 8
    assert all(result.after[index] <= result.before[index] for index in result.after)
