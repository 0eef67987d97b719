"""What a distillation compares, and what each term counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.padding import mean_of
from ..observing import Outputs
from ..tasks.labels import NO_LABEL, class_ids


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """What each term counts. All but `labels` compare student and teacher on the same images.

    Args:
        kl: KL divergence of the student's class distribution from the teacher's; nothing for a model without classes.
        head: Distance between what any other head gives and the teacher's, as its task has it.
        prefix: 1 - cosine of the prefix tokens (CLS) after the last norm.
        patches: Squared error of the normalised patch tokens after the last norm.
        blocks: Squared error over variance of the hidden states between the blocks, from the first skipped one on:
            every block is told at once where it went astray, where the other terms reach it through all later ones.
        temperature: Of both distributions in the KL term.
        labels: Cross-entropy of the student's class distribution with the true class, where an image has one.
    """

    kl: float = 1.0
    head: float = 1.0
    prefix: float = 0.5
    patches: float = 0.5
    blocks: float = 15.0
    temperature: float = 1.0
    labels: float = 0.0

    def of(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum (B,) of the terms that `distances` and `label_loss` give, by name."""
        weights = {
            "kl": self.kl,
            "head": self.head,
            "prefix": self.prefix,
            "patches": self.patches,
            "blocks": self.blocks,
            "labels": self.labels,
        }
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum(dim=0)


def distances(
    student: Outputs, teacher: Outputs, num_prefix_tokens: int, temperature: float = 1.0
) -> dict[str, Tensor]:
    """The terms of the loss for each image, (B,) by name.

    ``patches``, ``prefix`` and, for the states that both have, ``blocks`` where both models have the same tokens
    (another teacher may not); ``kl`` where both have classes, ``head`` where both have another head of one task.

    Raises:
        ValueError: The two models have nothing of this in common.
    """
    count = num_prefix_tokens
    terms: dict[str, Tensor] = {}
    if student.tokens.shape == teacher.tokens.shape:
        width = student.tokens.shape[-1:]
        mine, theirs = F.layer_norm(student.tokens, width), F.layer_norm(teacher.tokens, width)
        terms["patches"] = image_means((mine[:, count:] - theirs[:, count:]).square(), student.real)
        if count:
            cosine = F.cosine_similarity(student.tokens[:, :count], teacher.tokens[:, :count], dim=-1)
            terms["prefix"] = 1 - cosine.mean(dim=1)
        common = student.states.keys() & teacher.states.keys()
        if common:
            errors = [
                relative_error(student.states[index], teacher.states[index], count, student.real)
                for index in sorted(common)
            ]
            terms["blocks"] = torch.stack(errors).mean(dim=0)
    if student.task is not None and student.shares_head(teacher):
        terms[student.task.term] = student.task.distance(student.head, teacher.head, temperature)
    if not terms:
        raise ValueError("the model and its teacher have neither a head nor the shape of their tokens in common")
    return terms


def relative_error(found: Tensor, expected: Tensor, num_prefix_tokens: int, real: Tensor | None = None) -> Tensor:
    """Squared error over variance for each image (B,), patches and prefix tokens apart and then averaged.

    Only the patches that are no padding count, where `real` (B, N) tells.
    """
    parts = []
    for tokens, kept in ((slice(0, num_prefix_tokens), None), (slice(num_prefix_tokens, None), real)):
        mine, theirs = found[:, tokens], expected[:, tokens]
        if theirs.shape[1]:
            every = theirs if kept is None else theirs[kept][None]
            variance = (every - every.mean(dim=(0, 1))).square().mean()
            errors = image_means((mine - theirs).square(), kept)
            parts.append(errors / variance.clamp(min=torch.finfo(variance.dtype).tiny))
    return torch.stack(parts).mean(dim=0)


def image_means(values: Tensor, real: Tensor | None = None) -> Tensor:
    """The mean for each image (B,) of what its tokens have, (B, n, …), or of those that are `real` (B, n)."""
    if real is None:
        return values.mean(dim=tuple(range(1, values.ndim)))
    return mean_of(values.unflatten(1, (-1, 1)).flatten(2), real).mean(dim=(1, 2))


def distillation_loss(terms: Mapping[str, Tensor], weights: LossWeights, valid: Tensor | None = None) -> Tensor:
    """The weighted sum of the terms, averaged over the images, or over those that are valid (B,)."""
    total = weights.of(terms)
    return total.mean() if valid is None else (total * valid).sum() / valid.sum().clamp(min=1)


def mixup(images: Tensor, alpha: float, generator: torch.Generator) -> Tensor:
    """Each image mixed with another of the batch, in one random proportion; the teacher is asked about the mixture."""
    if alpha == 0:
        return images
    gammas = torch._standard_gamma(torch.full((2,), alpha), generator=generator)
    share = float(gammas[0] / gammas.sum())
    return share * images + (1 - share) * images[torch.randperm(len(images), generator=generator).to(images.device)]


def label_loss(logits: Tensor, labels: Any) -> Tensor:
    """Cross-entropy for each image (B,) of the logits (B, classes) with its label; 0 where it has none.

    Raises:
        ValueError: `labels.class_ids` does not take the labels.
    """
    return F.cross_entropy(logits, class_ids(labels, logits), ignore_index=NO_LABEL, reduction="none")
