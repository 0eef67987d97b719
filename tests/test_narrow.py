"""`narrow`: units taken out by value against a plain least squares, what is left alone, and what a checkpoint says."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path

import pytest
import timm
import torch
import transformers
from cases import Case, case_named
from runs import recipe, small_teacher
from safetensors.torch import load_file
from torch import Tensor, nn

import skipat_surgery
from skipat_surgery.convert.last_linear import last_linear
from skipat_surgery.convert.moments import Moments
from skipat_surgery.convert.narrow import narrow_tower
from skipat_surgery.convert.removal import DAMPING, GROUP, Removal, Weighed, widths_within
from skipat_surgery.convert.training import Training
from skipat_surgery.core.mlp import Mlp
from skipat_surgery.observing import states_of
from skipat_surgery.tower import Tower

LEFT_ALONE = ["timm eva, post-norm", "timm vit, res-post", "Swinv2Model", "timm davit"]


@pytest.fixture(scope="module")
def teacher(once) -> Path:
    return once("small_teacher", small_teacher)


def batches_of(case: Case, count: int = 4) -> list[Tensor]:
    return [case.images(batch=12, seed=number) for number in range(count)]


def cut(name: str) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    case = case_named(name)
    teacher, batches = case.model(), batches_of(case)
    student = skipat_surgery.apply(copy.deepcopy(teacher), case.skippable([2, 3]))
    skipat_surgery.solve(student, teacher, batches, progress=False)
    return student, teacher, batches


def problem(bias: bool = True) -> tuple[Removal, nn.Linear, Tensor, Tensor]:
    """A map of 40 hidden units that are correlated, with nothing to make up for, and its inputs."""
    torch.manual_seed(0)
    h = torch.randn(500, 40, dtype=torch.float64) @ torch.randn(40, 40, dtype=torch.float64) / 6 + 1
    linear, moments = nn.Linear(40, 6, bias=bias).double().requires_grad_(False), Moments()
    moments.add(h, torch.zeros(500, 6, dtype=torch.float64))
    scale = torch.rand(6, dtype=torch.float64) + 0.5
    return Removal(moments, linear, scale), linear, h, scale


@torch.no_grad()
def test_what_is_left_is_the_least_squares_fit_and_costs_add_up_to_its_error() -> None:
    removal, linear, h, scale = problem()
    costs = [cost for left, cost in removal.steps()][:3]
    removal = problem()[0]
    removal.down_to(40 - 3 * GROUP)
    kept = removal.kept
    assert len(kept) == 40 - 3 * GROUP
    second = (h - h.mean(dim=0)).T @ (h - h.mean(dim=0)) / len(h)
    second += DAMPING * second.diagonal().mean() * torch.eye(40, dtype=h.dtype)
    expected = linear.weight @ second[:, kept] @ torch.linalg.inv(second[kept][:, kept])
    torch.testing.assert_close(removal.weight[:, removal.stays], expected, rtol=0, atol=1e-10)
    rest = linear.weight.clone()
    rest[:, kept] -= expected
    error = (scale[:, None] * rest @ second @ (scale[:, None] * rest).T).trace()
    torch.testing.assert_close(torch.tensor(sum(costs)), error.float(), rtol=1e-5, atol=0)


@torch.no_grad()
def test_the_mean_output_stays_and_a_map_without_bias_fits_without_one() -> None:
    removal, linear, h, _ = problem()
    removal.down_to(GROUP)
    narrow = nn.Linear(GROUP, 6).double()
    removal.write(narrow)
    torch.testing.assert_close(narrow(h[:, removal.kept]).mean(dim=0), linear(h).mean(dim=0), rtol=0, atol=1e-10)
    removal, linear, h, _ = problem(bias=False)
    removal.down_to(2 * GROUP)
    kept, second = removal.kept, h.T @ h / len(h)
    second += DAMPING * second.diagonal().mean() * torch.eye(40, dtype=h.dtype)
    expected = linear.weight @ second[:, kept] @ torch.linalg.inv(second[kept][:, kept])
    torch.testing.assert_close(removal.weight[:, removal.stays], expected, rtol=0, atol=1e-10)


def test_widths_are_the_best_that_any_choice_of_steps_gives() -> None:
    """Where costs rise along each map, against all choices."""
    weighed = {
        "a": Weighed(32, 1.0, [(24, 1.0), (16, 2.0), (8, 6.0)]),
        "b": Weighed(32, 2.0, [(24, 1.5), (16, 5.0), (8, 9.0)]),
    }

    def error(choice: tuple[int, int]) -> float:
        return sum(
            cost for one, left in zip(weighed.values(), choice, strict=True) for at, cost in one.steps if at >= left
        )

    def price(choice: tuple[int, int]) -> float:
        return sum(one.price * left for one, left in zip(weighed.values(), choice, strict=True))

    for keep in (0.9, 0.75, 0.5):
        found = tuple(widths_within(weighed, keep).values())
        choices = [choice for choice in itertools.product((32, 24, 16, 8), repeat=2) if price(choice) <= price(found)]
        assert price(found) <= keep * 96
        assert error(found) == min(map(error, choices))


@pytest.mark.parametrize("name", ["ViTForImageClassification", "timm vit, registers", "Dinov2Model"])
def test_units_that_are_there_twice_go_at_no_loss(name: str) -> None:
    case = case_named(name)
    teacher, batches = case.model(), batches_of(case)
    tower = Tower.of(teacher)
    with torch.no_grad():
        for index, block in enumerate(tower.blocks):
            mlp = Mlp.of(tower.module, tower.family, index)
            maker, reader = (block.get_submodule(path) for path in (mlp.makers[0], mlp.reader))
            half = mlp.width(block) // 2
            maker.weight[half:], maker.bias[half:] = maker.weight[:half], maker.bias[:half]
            reader.weight[:, half:] = 0.5 * reader.weight[:, :half]
    narrow = copy.deepcopy(teacher)
    narrow_tower(narrow, Tower.of(narrow), tower, batches, 0.5, progress=False)
    new = case.images(batch=4, seed=9)
    for found, expected in zip(case.tensors(narrow, new), case.tensors(teacher, new), strict=True):
        assert (found - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize(
    "name",
    [
        "ViTForImageClassification",
        "timm vit, registers",
        "Dinov2Model",
        "DINOv3ViTModel",
        "timm eva02",
        "SwinModel",
        "timm hiera",
    ],
)
def test_a_narrow_model_is_saved_reported_and_restored(name: str, tmp_path) -> None:
    student, teacher, batches = cut(name)
    case, before = case_named(name), skipat_surgery.report(student)
    result = skipat_surgery.narrow(student, teacher, batches, keep=0.5, progress=False)
    assert sum(after for _, after in result.widths.values()) < 0.6 * sum(full for full, _ in result.widths.values())
    report = skipat_surgery.report(student)
    assert report.parameters_after < before.parameters_after
    assert report.macs_after < before.macs_after
    assert (report.parameters_before, report.macs_before) == (before.parameters_before, before.macs_before)
    skipat_surgery.save(student, tmp_path)
    loaded = skipat_surgery.load(tmp_path, case.model())
    new = case.images(batch=2, seed=9)
    for found, expected in zip(case.tensors(loaded, new), case.tensors(student, new), strict=True):
        assert torch.equal(found, expected)
    assert skipat_surgery.report(loaded) == report
    skipat_surgery.restore(student)
    for found, expected in zip(case.tensors(student, new), case.tensors(teacher, new), strict=True):
        assert torch.equal(found, expected)
    assert student.state_dict().keys() == teacher.state_dict().keys()


def test_a_transformers_checkpoint_says_how_wide_its_mlps_are(tmp_path) -> None:
    student, teacher, batches = cut("ViTForImageClassification")
    result = skipat_surgery.narrow(student, teacher, batches, keep=0.5, progress=False)
    student.float().save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.skipat["version"] == 3
    assert loaded.config.skipat["mlp_widths"] == {str(index): after for index, (_, after) in result.widths.items()}
    new = batches[0].float()
    assert torch.equal(loaded(new).logits, student(new).logits)


def test_a_timm_checkpoint_says_how_wide_its_mlps_are(tmp_path) -> None:
    student, teacher, batches = cut("timm vit")
    skipat_surgery.narrow(student, teacher, batches, keep=0.5, blocks=[1, 3], progress=False)
    student.float().save_pretrained(tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    new = batches[0].float()
    assert torch.equal(loaded(new), student(new))
    assert Tower.of(loaded).config.mlp_widths.keys() == {1, 3}


def test_what_is_narrowed_twice_returns_as_it_was_first() -> None:
    student, teacher, batches = cut("timm vit")
    first = skipat_surgery.narrow(student, teacher, batches, keep=0.75, progress=False).widths
    second = skipat_surgery.narrow(student, teacher, batches, keep=0.5, progress=False).widths
    assert {index: after for index, (_, after) in first.items()} == {index: full for index, (full, _) in second.items()}
    skipat_surgery.restore(student)
    assert torch.equal(student(batches[0]), teacher(batches[0]))


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_mlps_that_cannot_be_narrower_are_refused_before_anything_changes(name: str) -> None:
    student, teacher, batches = cut(name)
    state = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match=r"block 1 cannot be narrower: .*; leave it out of blocks"):
        skipat_surgery.narrow(student, teacher, batches, blocks=[1], progress=False)
    assert all(torch.equal(tensor, state[name]) for name, tensor in student.state_dict().items())


def test_values_far_above_the_others_hide_no_linear_map_in_bfloat16() -> None:
    """As DINOv2's have them: what bfloat16 rounds off those is more than what all others hold."""
    teacher = case_named("timm vit, registers").model().float()
    with torch.no_grad():
        teacher.blocks[3].mlp.fc2.bias[5] = 400.0
    tower = Tower.of(teacher)
    reader = tower.blocks[3].mlp.fc2

    def run() -> Tensor:
        return states_of(tower, 3, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = last_linear({reader}, run)
    assert found is not None
    assert found[0] is reader
    torch.testing.assert_close(found[1], teacher.blocks[3].ls2.gamma.detach(), rtol=0, atol=1e-3)


def test_an_mlp_that_is_used_twice_is_refused() -> None:
    student, teacher, batches = cut("timm vit")
    student.blocks[4].mlp = student.blocks[3].mlp
    with pytest.raises(ValueError, match="block 3 cannot be narrower: its MLP is used elsewhere too"):
        skipat_surgery.narrow(student, teacher, batches, blocks=[3], progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 1.0}, "keep must be a share"),
        ({"keep": 0}, "keep must be a share"),
        ({"keep": True}, "keep must be a share"),
        ({"blocks": []}, "blocks must name some of 0 to 5"),
        ({"blocks": [6]}, "blocks must name some of 0 to 5"),
    ],
)
def test_what_is_asked_for_is_checked(options, message: str) -> None:
    student, teacher, batches = cut("timm vit")
    with pytest.raises(ValueError, match=message):
        skipat_surgery.narrow(student, teacher, batches, progress=False, **options)
    with pytest.raises(ValueError, match="the model is not cut"):
        skipat_surgery.narrow(teacher, teacher, batches, progress=False)


@pytest.mark.parametrize(
    ("widths", "error", "message"),
    [
        ({9: 8}, ValueError, "names block 9; there are 6"),
        ({1: 0}, ValueError, "block 1 0 hidden units; allowed are 1 to"),
        ({1: 10_000}, ValueError, "allowed are 1 to"),
        ({1: 2.5}, TypeError, "mlp_widths must map"),
    ],
)
def test_a_configuration_is_checked_before_anything_changes(widths, error, message: str) -> None:
    model = case_named("timm vit").model()
    with pytest.raises(error, match=message):
        skipat_surgery.apply(model, skipat_surgery.SkipatConfig({2: skipat_surgery.PhiConfig()}, mlp_widths=widths))
    assert not skipat_surgery.Tower.of(model).skip


def test_a_run_that_narrows_resumes_to_the_same_weights(teacher: Path, tmp_path: Path, monkeypatch) -> None:
    options = {"mlp_keep": 0.5, "checkpoint_steps": 2, "eval_steps": 2}
    recipe(teacher, tmp_path / "whole", **options).run()
    fit = Training.fit

    def broken(training, loader, measure, save):
        def then_break(step):
            save(step)
            raise KeyboardInterrupt

        fit(training, loader, measure, then_break)

    with monkeypatch.context() as patched:
        patched.setattr(Training, "fit", broken)
        with pytest.raises(KeyboardInterrupt):
            recipe(teacher, tmp_path / "broken", **options).run()
    resumed = recipe(teacher, tmp_path / "broken", resume=True, **options)
    assert resumed.resumed is not None
    resumed.run()
    whole, again = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(weight, again[name]) for name, weight in whole.items())


def test_the_best_of_a_run_is_narrow_and_each_stage_has_its_own_costs(teacher: Path, tmp_path: Path) -> None:
    run = recipe(teacher, tmp_path / "run", mlp_keep=0.5)
    run.run()
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert list(rows) == ["teacher", "cut", "solved", "narrowed", "distilled"]
    assert rows["distilled"]["gflops"] == rows["narrowed"]["gflops"] < rows["solved"]["gflops"] == rows["cut"]["gflops"]
    for name in ("best", "last"):
        saved = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "run" / name)
        assert set(saved.config.skipat["mlp_widths"]) == {"0", "1", "2", "3", "4"}
        mlp = saved.vit.layers[0].mlp
        assert mlp.fc1.weight.requires_grad
        assert mlp.fc1.out_features == saved.config.skipat["mlp_widths"]["0"] < 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp_keep": 0.0}, "--mlp_keep must be above 0"),
        ({"mlp_keep": 0.5, "solve_images": 0}, "--mlp_keep needs --solve_images"),
    ],
)
def test_what_a_run_is_asked_for_is_checked(options, message: str, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(teacher, tmp_path / "run", **options)
