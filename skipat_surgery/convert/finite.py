"""No number is lost without a word: weights that can take small steps, and a loss, figures and weights that are finite.

float16 overflows beyond 65504, and half precision rounds most small steps away. Models are trained in float32, with
autocast where half precision is to save time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from ..batches import Images, values_of

HALF = {torch.float16, torch.bfloat16}
OVERFLOW = "float16 overflows beyond 65504: compute in bfloat16 or float32 (--mixed_precision bf16 or no)"


def check_precision(student: nn.Module, teacher: nn.Module) -> None:
    """Check that models are in a precision that can be trained.

    Raises:
        ValueError: The weights of one are in half precision.
    """
    for name, model in (("student", student), ("teacher", teacher)):
        found = sorted(map(str, {parameter.dtype for parameter in model.parameters()} & HALF))
        if found:
            raise ValueError(
                f"the {name}'s weights are {' and '.join(found)}, which rounds most small steps away: pass "
                f"{name}.float(), inside torch.autocast where half precision is to save time, and cast the student "
                "back with .to(dtype) when it is trained"
            )


def in_float16(device: torch.device) -> bool:
    """Whether autocast computes in float16 here."""
    return torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16


def check_loss(
    loss: float, step: int, student: nn.Module, teacher: nn.Module, images: Images, *, float16: bool = False
) -> None:
    """Check the loss of one step, before its gradient changes anything.

    Args:
        loss: Of the step.
        step: Its number, from 1.
        student: The model that is trained.
        teacher: The model that it learns from.
        images: The images of the step.
        float16: Whether the loss was computed in float16.

    Raises:
        FloatingPointError: It is not finite; with the step and the cause.
    """
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss} at step {step}: {_cause(step, student, teacher, images, float16)}"
        )


def _cause(step: int, student: nn.Module, teacher: nn.Module, images: Images, float16: bool) -> str:
    if not bool(values_of(images).isfinite().all()):
        return "the images hold values that are not finite"
    if not_finite(teacher):
        return f"the teacher's weights are not finite ({not_finite(teacher)[0]})"
    if not_finite(student):
        what = "the weights it was given" if step == 1 else "the steps before left weights that"
        return f"{what} are not finite ({not_finite(student)[0]})" + ("" if step == 1 else "; lower the learning rates")
    if float16:
        return f"{OVERFLOW}, or lower the learning rates"
    if step == 1:
        return "no step was taken yet, so that the models overflow on these images as they are"
    return "lower the learning rates"


def not_finite(model: nn.Module) -> list[str]:
    """The names of the parameters that hold values that are not finite."""
    return [name for name, parameter in model.named_parameters() if not bool(parameter.isfinite().all())]


def check_weights(model: nn.Module, advice: str) -> None:
    """Check the weights of a model before they are written.

    Args:
        model: Any.
        advice: What to do where they are not finite.

    Raises:
        FloatingPointError: Some are not finite.
    """
    if wrong := not_finite(model):
        raise FloatingPointError(
            f"{len(wrong)} of the model's tensors are not finite ({wrong[0]}), and were not written: {advice}"
        )


def check_figures(figures: Mapping[str, float], *, float16: bool = False) -> None:
    """Check what was measured.

    Args:
        figures: By name.
        float16: Whether they were computed in float16.

    Raises:
        FloatingPointError: One is not finite.
    """
    if wrong := {name: value for name, value in figures.items() if not math.isfinite(value)}:
        cause = OVERFLOW if float16 else "look at the weights of both, and lower the learning rates"
        raise FloatingPointError(f"the outputs of the model or of its teacher are not finite, {wrong}: {cause}")
