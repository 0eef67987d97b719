"""How a cut model is measured against its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..observing import Outputs, outputs_of
from ..tower import Tower
from .losses import distances


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
            student = outputs_of(model, tower, batch["pixel_values"])
            teacher = outputs_of(self.teacher, self.tower, batch["pixel_values"])
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
