"""How a cut model is measured against its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..observing import Outputs, labels_of, outputs_of, pixels_of
from ..tower import Tower
from .finite import check_figures, in_float16
from .losses import distances


def _as_it_is(row: Any) -> Any:
    return row


class Evaluator:
    """Measures a model against its teacher on a whole split, on any number of processes, each image once.

    Args:
        teacher: The untouched model.
        labelled: Whether the batches hold labels.
        gather: accelerate's ``gather_for_metrics``, which drops what pads the last batch; nothing in one process.

    Example:
        >>> Evaluator(teacher, labelled=True)(student, loader)["agreement"]  # doctest: +SKIP
    """

    def __init__(self, teacher: nn.Module, *, labelled: bool = False, gather: Callable[[Any], Any] = _as_it_is) -> None:
        self.teacher, self.labelled, self.gather = teacher, labelled, gather
        self.tower = Tower.of(teacher)

    def __call__(self, model: nn.Module, loader: Iterable[Any]) -> dict[str, float]:
        """Measure a model on batches that are not shuffled.

        Args:
            model: The cut model.
            loader: Image batches (B, C, H, W), ``(images, labels)`` pairs, or mappings with ``pixel_values``,
                ``labels``, and ``valid`` (B,), which is False for images to leave out.

        Returns:
            ``agreement`` and ``kl`` where there are classes, ``top1`` and ``teacher_top1`` where there are labels too,
            ``patch_cosine``, ``prefix_cosine``, the number of ``images`` measured and of ``corrupt`` ones left out.

        Raises:
            FloatingPointError: The outputs of one of the models are not finite.
        """
        return self.summarise(self.by_image(model, loader))

    @torch.no_grad()
    def by_image(self, model: nn.Module, loader: Iterable[Any]) -> dict[str, Tensor]:
        """What `__call__` averages, image by image: (images,) by name, in the order of the loader."""
        tower, training = Tower.of(model), model.training
        model.eval()
        columns: dict[str, list[Tensor]] = {}
        for batch in loader:
            pixels = pixels_of(batch).to(next(model.parameters()).device)
            student, teacher = outputs_of(model, tower, pixels), outputs_of(self.teacher, self.tower, pixels)
            row = self.gather(self._measure(student, teacher, batch))
            for name, values in row.items():
                columns.setdefault(name, []).append(values)
        model.train(training)
        return {name: torch.cat(values) for name, values in columns.items()}

    def _measure(self, student: Outputs, teacher: Outputs, batch: Any) -> dict[str, Tensor]:
        count = self.tower.num_special_tokens
        cosine = F.cosine_similarity(student.tokens, teacher.tokens, dim=-1)
        valid = batch.get("valid") if isinstance(batch, Mapping) else None
        if valid is None:
            valid = torch.ones(len(cosine), dtype=torch.bool, device=cosine.device)
        row = {"valid": valid, "patch_cosine": cosine[:, count:].mean(dim=1)}
        if count:
            row["prefix_cosine"] = cosine[:, :count].mean(dim=1)
        if student.logits is not None and teacher.logits is not None:
            row["kl"] = distances(student, teacher, count)["kl"]
            predicted, expected = student.logits.argmax(dim=-1), teacher.logits.argmax(dim=-1)
            row["agreement"] = (predicted == expected).float()
            if self.labelled:
                labels = labels_of(batch)
                if labels is None:
                    raise ValueError("labelled=True needs batches with labels")
                labels = labels.to(predicted.device)
                row["top1"] = (predicted == labels).float()
                row["teacher_top1"] = (expected == labels).float()
        return row

    def summarise(self, columns: Mapping[str, Tensor], images: Tensor | None = None) -> dict[str, float]:
        """The means over the images that `by_image` saw, or over these of them."""
        chosen = {name: values if images is None else values[images] for name, values in columns.items()}
        valid = chosen.pop("valid").bool()
        if not bool(valid.any()):
            raise ValueError("not one image of the evaluation split could be read")
        means = {name: float(values[valid].double().mean()) for name, values in chosen.items()}
        check_figures(means, float16=in_float16(valid.device))
        return {**means, "images": int(valid.sum()), "corrupt": int((~valid).sum())}


def score(figures: Mapping[str, float]) -> tuple[float, ...]:
    """What makes one model better than another on the same images: the greater tuple is the better model.

    The classes first, and their KL where as many agree; without classes the tokens.
    """
    if "agreement" in figures:
        return figures["agreement"], -figures["kl"]
    return tuple(figures[name] for name in ("prefix_cosine", "patch_cosine") if name in figures)
