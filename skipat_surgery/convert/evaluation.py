"""How a cut model is measured against its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..observing import Outputs, labels_of, outputs_of, pixels_of
from ..tasks.finding import task_of
from ..tasks.task import Task
from ..tower import Tower
from .finite import check_figures, in_float16
from .losses import image_means

OF_TEACHER = "teacher_"  # before the names of its own figures, those that labels tell


def _as_it_is(row: Any) -> Any:
    return row


class Evaluator:
    """Measures a model against its teacher on a whole split, on any number of processes, each image once.

    Args:
        teacher: The untouched model.
        labelled: Whether the batches hold labels: classes (B,), or for a model that gives maps a list with the map
            (height, width) of each image, at whatever size, or None.
        gather: accelerate's ``gather_for_metrics``, which drops what pads the last batch; nothing in one process.
        task: What both models are for; found when left out.

    Examples:
        >>> import copy
        >>> import timm
        >>> import torch
        >>> import skipat_surgery
        >>> small = dict(img_size=32, patch_size=8, embed_dim=32, depth=6, num_heads=2, num_classes=4)
        >>> teacher = timm.create_model("vit_tiny_patch16_224", **small).eval()
        >>> student = skipat_surgery.apply(copy.deepcopy(teacher), skip=[2, 3])
        >>> batches = torch.randn(64, 3, 32, 32).split(16)
        >>> measured = skipat_surgery.Evaluator(teacher)(student, batches)
        >>> sorted(measured)
        ['agreement', 'corrupt', 'images', 'kl', 'patch_cosine', 'prefix_cosine']
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        labelled: bool = False,
        gather: Callable[[Any], Any] = _as_it_is,
        task: Task | None = None,
    ) -> None:
        self.teacher, self.labelled, self.gather = teacher, labelled, gather
        self.tower = Tower.of(teacher)
        self.task = task_of(teacher) if task is None else task

    def __call__(self, model: nn.Module, loader: Iterable[Any]) -> dict[str, float]:
        """Measure a model on batches that are not shuffled.

        Args:
            model: The cut model.
            loader: Batches of images (B, C, H, W) or videos (B, T, C, H, W), ``(images, labels)`` pairs, or mappings
                with ``pixel_values``, ``labels``, and ``valid`` (B,), which is False for images to leave out.

        Returns:
            The figures of the task, such as ``agreement``, with its term of the loss (``kl`` of a classifier, ``head``
            of others); over the ``labelled`` images, where there are some, what labels tell of the model and, after
            ``teacher_``, of its teacher, such as ``top1`` and ``teacher_top1``; ``patch_cosine``, ``prefix_cosine``,
            the number of ``images`` measured and of ``corrupt`` ones left out.

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
            student = outputs_of(model, tower, pixels, task=self.task)
            teacher = outputs_of(self.teacher, self.tower, pixels, task=self.task)
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
        row = {"valid": valid, "patch_cosine": image_means(cosine[:, count:], student.real)}
        if count:
            row["prefix_cosine"] = cosine[:, :count].mean(dim=1)
        task = student.task
        if task is not None and student.shares_head(teacher):
            row[task.term] = task.distance(student.head, teacher.head)
            row |= task.figures(student.head, teacher.head)
        if self.labelled and task is not None and task.by_label and student.head and teacher.head:
            row |= self._against_labels(task, student, teacher, labels_of(batch))
        return row

    def _against_labels(self, task: Task, student: Outputs, teacher: Outputs, labels: Any) -> dict[str, Tensor]:
        if labels is None:
            raise ValueError("labelled=True needs batches with labels")
        mine, labelled = task.against_labels(student.head, labels)
        theirs, _ = task.against_labels(teacher.head, labels)
        return {"labelled": labelled, **mine, **{OF_TEACHER + name: values for name, values in theirs.items()}}

    def summarise(self, columns: Mapping[str, Tensor], images: Tensor | None = None) -> dict[str, float]:
        """The means over the images that `by_image` saw, or over these of them."""
        chosen = {name: values if images is None else values[images] for name, values in columns.items()}
        valid = chosen.pop("valid").bool()
        if not bool(valid.any()):
            raise ValueError("not one image of the evaluation split could be read")
        counts = {"images": int(valid.sum()), "corrupt": int((~valid).sum())}
        means = {name: values[valid] for name, values in chosen.items()}
        against: dict[str, float] = {}
        if self.task is not None and "labelled" in means:
            labelled = means.pop("labelled").bool()
            counts["labelled"] = int(labelled.sum())
            for owner in ("", OF_TEACHER):
                by_label = {name: means.pop(owner + name)[labelled] for name in self.task.by_label}
                told = self.task.of_labels(by_label) if counts["labelled"] else {}
                against |= {owner + name: value for name, value in told.items()}
        sums = {
            name: means.pop(name).double().sum(dim=0) for name in (self.task.sums if self.task else ()) if name in means
        }
        figures = {name: float(values.double().mean()) for name, values in means.items()}
        figures |= against | (self.task.of_sums(sums) if self.task and sums else {})
        check_figures(figures, float16=in_float16(valid.device))
        return {**figures, **counts}


def score(figures: Mapping[str, float]) -> tuple[float, ...]:
    """What makes one model better than another on the same images: the greater tuple is the better model.

    The classes first, and their KL where as many agree; what another head gives; without one the tokens.
    """
    if "kl" in figures:
        return figures["agreement"], -figures["kl"]
    if "head" in figures:
        return (-figures["head"],)
    return tuple(figures[name] for name in ("prefix_cosine", "patch_cosine") if name in figures)
