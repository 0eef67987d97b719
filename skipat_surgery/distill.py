"""End-to-end distillation of a cut model against its teacher: losses, what is trained, how it is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .capture import Tower, logits_of, num_classes_of, observe


@dataclass(frozen=True)
class LossWeights:
    """What each term counts. All but `labels` compare student and teacher on the same images.

    Args:
        kl: KL divergence of the student's class distribution from the teacher's; nothing for a model without classes.
        prefix: 1 - cosine of the prefix tokens (CLS) after the last norm.
        patches: Squared error of the normalised patch tokens after the last norm.
        blocks: Squared error over variance of the hidden states between the blocks, from the first skipped one on:
            every block is told at once where it went astray, where the other terms reach it through all later ones.
        temperature: Of both distributions in the KL term.
        labels: Cross-entropy of the student's class distribution with the true class, where an image has one.
    """

    kl: float = 1.0
    prefix: float = 0.5
    patches: float = 0.5
    blocks: float = 0.0
    temperature: float = 1.0
    labels: float = 0.0


@dataclass(frozen=True)
class Outputs:
    """What the loss compares, in float32.

    Args:
        logits: (B, classes), or None.
        tokens: The tokens after the last norm (B, N, D).
        states: The hidden states (B, N, D) after chosen blocks, by block.
    """

    logits: Tensor | None
    tokens: Tensor
    states: Mapping[int, Tensor] = field(default_factory=dict)


def run(model: nn.Module, tower: Tower, images: Tensor, states: Iterable[int] = ()) -> Outputs:
    """Run a model, which may be wrapped, and keep what the loss compares.

    Args:
        model: The model to call.
        tower: The tower inside it.
        images: (B, C, H, W).
        states: The blocks whose output to keep.
    """
    with observe(tower, tokens=True, states=states) as seen:
        logits = logits_of(model(images))
    assert seen.tokens is not None
    between = {index: state.float() for index, state in seen.states.items()}
    return Outputs(None if logits is None else logits.float(), seen.tokens.float(), between)


def distances(
    student: Outputs, teacher: Outputs, num_prefix_tokens: int, temperature: float = 1.0
) -> dict[str, Tensor]:
    """The terms of the loss for each image, (B,) by name.

    ``patches``, ``prefix`` and, for the states that both have, ``blocks`` where both models have the same tokens
    (another teacher may not); ``kl`` where both have classes.

    Raises:
        ValueError: The two models have neither in common.
    """
    count = num_prefix_tokens
    terms: dict[str, Tensor] = {}
    if student.tokens.shape == teacher.tokens.shape:
        width = student.tokens.shape[-1:]
        mine, theirs = F.layer_norm(student.tokens, width), F.layer_norm(teacher.tokens, width)
        terms["patches"] = (mine[:, count:] - theirs[:, count:]).square().mean(dim=(1, 2))
        if count:
            cosine = F.cosine_similarity(student.tokens[:, :count], teacher.tokens[:, :count], dim=-1)
            terms["prefix"] = 1 - cosine.mean(dim=1)
        common = student.states.keys() & teacher.states.keys()
        if common:
            errors = [relative_error(student.states[index], teacher.states[index], count) for index in sorted(common)]
            terms["blocks"] = torch.stack(errors).mean(dim=0)
    if student.logits is not None and teacher.logits is not None:
        log_p = (teacher.logits / temperature).log_softmax(dim=-1)
        log_q = (student.logits / temperature).log_softmax(dim=-1)
        terms["kl"] = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=-1) * temperature**2
    if not terms:
        raise ValueError("the model and its teacher have neither classes nor the shape of their tokens in common")
    return terms


def relative_error(found: Tensor, expected: Tensor, num_prefix_tokens: int) -> Tensor:
    """Squared error over variance for each image (B,), patches and prefix tokens apart and then averaged."""
    parts = []
    for tokens in (slice(0, num_prefix_tokens), slice(num_prefix_tokens, None)):
        mine, theirs = found[:, tokens], expected[:, tokens]
        if theirs.shape[1]:
            variance = (theirs - theirs.mean(dim=(0, 1))).square().mean()
            parts.append(
                (mine - theirs).square().mean(dim=(1, 2)) / variance.clamp(min=torch.finfo(variance.dtype).tiny)
            )
    return torch.stack(parts).mean(dim=0)


def distillation_loss(terms: dict[str, Tensor], valid: Tensor, weights: LossWeights) -> Tensor:
    """The weighted sum of the terms, averaged over the valid images (B,)."""
    total = sum(
        (getattr(weights, name) * term for name, term in terms.items()), torch.zeros_like(valid, dtype=torch.float)
    )
    return (total * valid).sum() / valid.sum().clamp(min=1)


def mixup(images: Tensor, alpha: float, generator: torch.Generator) -> Tensor:
    """Each image mixed with another of the batch, in one random proportion; the teacher is asked about the mixture."""
    if alpha == 0:
        return images
    gammas = torch._standard_gamma(torch.full((2,), alpha), generator=generator)
    share = float(gammas[0] / gammas.sum())
    return share * images + (1 - share) * images[torch.randperm(len(images), generator=generator).to(images.device)]


def freeze_untouched(model: nn.Module) -> int:
    """Freeze what the cut did not change: the embeddings and the blocks before the first skipped one.

    They give exactly what the teacher's give. For a model without classes, what comes after the last norm is frozen
    too, as no term of the loss reads it.

    Returns:
        The number of parameters that remain trainable.
    """
    tower = Tower.of(model)
    blocks = tower.family.block_list(tower.module)
    trained: list[nn.Module] = [*blocks[tower.skip[0] :], tower.last_module()]
    if num_classes_of(model) is not None:
        inside = {id(parameter) for parameter in tower.module.parameters()}
        head = [
            p for name, p in model.named_parameters() if id(p) not in inside or name.startswith(("head", "fc_norm"))
        ]
    else:
        head = []
    keep = {id(parameter) for module in trained for parameter in module.parameters()} | {id(p) for p in head}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in keep)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def optimizers(
    model: nn.Module, learning_rate: float, muon_learning_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices inside the blocks, AdamW for all the rest.

    A converted model starts close to its teacher and has few steps to spend; Muon's orthogonal updates spend them
    better. With a Muon rate of 0, AdamW trains everything.
    """
    tower = Tower.of(model)
    inside = {id(p) for p in tower.family.block_list(tower.module).parameters() if p.ndim == 2}
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if id(p) in inside and muon_learning_rate > 0]
    chosen = {id(p) for p in matrices}
    rest = [p for p in trainable if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=(0.9, 0.98))
    if not matrices:
        return [adamw]
    return [
        adamw,
        torch.optim.Muon(matrices, lr=muon_learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
    ]


class Evaluator:
    """Measures a model against its teacher on a whole split, on any number of processes, each image once.

    Args:
        teacher: The untouched model.
        labelled: Whether the batches hold labels.
        gather: accelerate's ``gather_for_metrics``, which drops what pads the last batch.
    """

    def __init__(self, teacher: nn.Module, labelled: bool, gather: Callable[[Any], Any]) -> None:
        self.teacher, self.labelled, self.gather = teacher, labelled, gather
        self.tower = Tower.of(teacher)

    @torch.no_grad()
    def __call__(self, model: nn.Module, loader: Iterable[Any]) -> dict[str, float]:
        """Measure a model on batches of pixel_values, labels and valid, prepared by accelerate and not shuffled.

        Returns:
            ``agreement`` and ``kl`` where there are classes, ``top1`` and ``teacher_top1`` where there are labels too,
            ``patch_cosine``, ``prefix_cosine``, the number of ``images`` measured and of ``corrupt`` ones left out.
        """
        tower, training = Tower.of(model), model.training
        model.eval()
        columns: dict[str, list[Tensor]] = {}
        for batch in loader:
            student = run(model, tower, batch["pixel_values"])
            teacher = run(self.teacher, self.tower, batch["pixel_values"])
            row = self.gather(self._measure(student, teacher, batch))
            for name, values in row.items():
                columns.setdefault(name, []).append(values)
        model.train(training)
        return self._summarise({name: torch.cat(values) for name, values in columns.items()})

    def _measure(self, student: Outputs, teacher: Outputs, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        count = self.tower.num_prefix_tokens
        cosine = F.cosine_similarity(student.tokens, teacher.tokens, dim=-1)
        row = {"valid": batch["valid"], "patch_cosine": cosine[:, count:].mean(dim=1)}
        if count:
            row["prefix_cosine"] = cosine[:, :count].mean(dim=1)
        if student.logits is not None and teacher.logits is not None:
            row["kl"] = distances(student, teacher, count)["kl"]
            predicted, expected = student.logits.argmax(dim=-1), teacher.logits.argmax(dim=-1)
            row["agreement"] = (predicted == expected).float()
            if self.labelled:
                row["top1"] = (predicted == batch["labels"]).float()
                row["teacher_top1"] = (expected == batch["labels"]).float()
        return row

    @staticmethod
    def _summarise(columns: dict[str, Tensor]) -> dict[str, float]:
        valid = columns.pop("valid").bool()
        if not bool(valid.any()):
            raise ValueError("not one image of the evaluation split could be read")
        means = {name: float(values[valid].double().mean()) for name, values in columns.items()}
        return {**means, "images": int(valid.sum()), "corrupt": int((~valid).sum())}
