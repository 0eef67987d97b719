"""One class, several labels, or numbers for each image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .labels import NO_LABEL, class_ids
from .task import Head, Task


class Logits(Task):
    """A head that gives logits (B, classes)."""

    def read(self, output: Any) -> dict[str, Tensor]:
        """``logits`` (B, classes); of timm's distilled models in training, the mean of both heads."""
        if isinstance(output, tuple) and not hasattr(output, "logits"):
            return {"logits": torch.stack(output).mean(dim=0)}
        return {"logits": output if isinstance(output, Tensor) else output.logits}


class Classification(Logits):
    """One class for each image: KL divergence, and the share of images put in the same class."""

    name, term = "classification", "kl"
    by_label, labelled_by = ("top1",), "class"

    def distance(self, found: Head, expected: Head, temperature: float = 1.0) -> Tensor:
        """KL divergence of the class distribution from the teacher's, times the squared temperature."""
        return class_divergence(found["logits"], expected["logits"], temperature)

    def figures(self, found: Head, expected: Head) -> dict[str, Tensor]:
        """``agreement``."""
        return {"agreement": (found["logits"].argmax(dim=-1) == expected["logits"].argmax(dim=-1)).float()}

    def against_labels(self, head: Head, labels: Any) -> tuple[dict[str, Tensor], Tensor]:
        """``top1``."""
        return top1(head["logits"], labels)


class MultiLabel(Logits):
    """Several labels for each image, each by itself: binary KL divergences, and the share of labels told alike."""

    name = "multi-label classification"

    def distance(self, found: Head, expected: Head, temperature: float = 1.0) -> Tensor:
        """The binary KL divergences of all labels, added up."""
        return binary_divergence(found["logits"], expected["logits"]).sum(dim=-1)

    def figures(self, found: Head, expected: Head) -> dict[str, Tensor]:
        """``agreement``, over images and labels."""
        return {"agreement": ((found["logits"] > 0) == (expected["logits"] > 0)).float().mean(dim=-1)}


class Regression(Logits):
    """Numbers for each image: their squared error, and their absolute one in their own unit."""

    name = "regression"

    def distance(self, found: Head, expected: Head, temperature: float = 1.0) -> Tensor:
        """Squared error over the mean square of what the teacher gives for these images."""
        scale = expected["logits"].square().mean().clamp(min=torch.finfo(torch.float32).tiny)
        return (found["logits"] - expected["logits"]).square().mean(dim=-1) / scale

    def figures(self, found: Head, expected: Head) -> dict[str, Tensor]:
        """``absolute_error``."""
        return {"absolute_error": (found["logits"] - expected["logits"]).abs().mean(dim=-1)}


def top1(logits: Tensor, labels: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Whether the first class is the label of an image, and whether it has one, (B,) each."""
    wanted = class_ids(labels, logits)
    return {"top1": (logits.argmax(dim=-1) == wanted).float()}, wanted != NO_LABEL


def class_divergence(found: Tensor, expected: Tensor, temperature: float = 1.0, dim: int = -1) -> Tensor:
    """KL divergence over the classes of logits along one dimension, times the squared temperature."""
    log_p, log_q = ((logits / temperature).log_softmax(dim=dim) for logits in (expected, found))
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=dim) * temperature**2


def binary_divergence(found: Tensor, expected: Tensor) -> Tensor:
    """KL divergence of Bernoulli distributions, number by number, from their logits."""
    p = expected.sigmoid()
    cross = F.binary_cross_entropy_with_logits(found, p, reduction="none")
    return cross - F.binary_cross_entropy_with_logits(expected, p, reduction="none")
