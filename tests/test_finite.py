"""Half precision and what is not finite, in the library's own loops."""

from __future__ import annotations

import copy

import pytest
import torch

import skipat_surgery
from skipat_surgery.convert.evaluation import Evaluator, score
from skipat_surgery.convert.finite import check_figures, check_loss
from skipat_surgery.convert.settings import TrainingConfig


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("train", [skipat_surgery.distill, skipat_surgery.align])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_half_precision_is_refused_with_what_to_do(vit, who, train, dtype):
    models = {"student": skipat_surgery.apply(copy.deepcopy(vit), [2]), "teacher": vit}
    models[who].to(dtype)
    before = [parameter.requires_grad for parameter in models["student"].parameters()]
    with pytest.raises(
        ValueError, match=rf"the {who}'s weights are {dtype}.*pass {who}.float\(\), inside torch.autocast"
    ):
        train(*models.values(), [torch.randn(2, 3, 32, 32, dtype=dtype)], steps=1, progress=False)
    assert [parameter.requires_grad for parameter in models["student"].parameters()] == before


def test_align_stops_before_a_step_on_a_loss_that_is_not_finite(vit):
    cut = skipat_surgery.apply(copy.deepcopy(vit), [2, 3])
    images = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64)
    images[1] = float("inf")
    by_one = copy.deepcopy(cut)
    skipat_surgery.align(by_one, vit, [images[0]], steps=1, progress=False)
    with pytest.raises(FloatingPointError, match="at step 2: the images hold values that are not finite"):
        skipat_surgery.align(cut, vit, list(images), steps=2, progress=False)
    for name, weight in by_one.state_dict().items():
        assert torch.equal(weight, cut.state_dict()[name]), name


def with_nan(model: torch.nn.Module) -> torch.nn.Module:
    broken = copy.deepcopy(model)
    next(broken.parameters()).data.fill_(float("nan"))
    return broken


def test_the_cause_of_a_loss_that_is_not_finite(vit):
    images, nan = torch.zeros(1, 3, 32, 32), float("nan")
    causes = {
        "the teacher's weights are not finite": (1, vit, with_nan(vit), images, False),
        "the images hold values": (3, vit, vit, images * nan, False),
        "the steps before left weights that are not finite .*; lower the learning rates": (
            3,
            with_nan(vit),
            vit,
            images,
            True,
        ),
        "the weights it was given are not finite": (1, with_nan(vit), vit, images, False),
        "float16 overflows beyond 65504": (2, vit, vit, images, True),
        "no step was taken yet": (1, vit, vit, images, False),
        "lower the learning rates": (2, vit, vit, images, False),
    }
    for cause, (step, student, teacher, pixels, float16) in causes.items():
        with pytest.raises(FloatingPointError, match=f"the loss is nan at step {step}: .*{cause}"):
            check_loss(nan, step, student, teacher, pixels, float16=float16)
    check_loss(1.0, 2, with_nan(vit), vit, images)


def test_figures_that_are_not_finite_are_no_figures(vit):
    cut = skipat_surgery.apply(copy.deepcopy(vit), [2])
    with pytest.raises(FloatingPointError, match=r"not finite, .*'kl': nan"):
        Evaluator(vit)(with_nan(cut), [torch.randn(2, 3, 32, 32, dtype=torch.float64)])
    with pytest.raises(FloatingPointError, match="float16 overflows"):
        check_figures({"kl": float("inf")}, float16=True)


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "kl_weight", "rate_scale"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_settings_are_finite(name, value):
    with pytest.raises(ValueError, match=f"{name} must .*finite, got {value}"):
        TrainingConfig(**{name: value})


def test_what_makes_one_model_better_than_another():
    tokens = {"patch_cosine": 0.5, "prefix_cosine": 0.9}
    assert score({**tokens, "agreement": 0.9, "kl": 0.3}) < score({**tokens, "agreement": 0.91, "kl": 0.4})
    assert score({**tokens, "agreement": 0.9, "kl": 0.3}) < score({**tokens, "agreement": 0.9, "kl": 0.2})
    assert score(tokens) < score({**tokens, "patch_cosine": 0.6})
    assert score({"patch_cosine": 0.5}) < score({"patch_cosine": 0.6})
