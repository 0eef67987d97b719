"""The figures of a run's models: on all evaluation images, and on the sample by which the best model is found."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from ..batches import Images
from ..convert.evaluation import Evaluator
from ..convert.settings import TrainingConfig
from ..measure.counting import count_parameters, gflops
from ..measure.timing import throughput
from .images import Collate
from .loading import LoadedModel

Figures = dict[str, float]


class Measuring:
    """Measures models against the untouched one, as their checkpoints give them back.

    Args:
        host: The untouched model.
        items: The evaluation images.
        collate: Makes batches of them.
        labelled: Whether they have labels.
        accelerator: Of the run.
        config: How many images make the sample, and which.
    """

    def __init__(
        self,
        host: LoadedModel,
        items: Dataset[Any],
        collate: Collate,
        labelled: bool,
        accelerator: Accelerator,
        config: TrainingConfig,
    ) -> None:
        self.host, self.accelerator = host, accelerator
        self.evaluate = Evaluator(host.model, labelled=labelled, gather=accelerator.gather_for_metrics)
        count = len(items)  # type: ignore[arg-type]
        order = torch.randperm(count, generator=torch.Generator().manual_seed(config.seed))
        self.sample = order[: config.eval_images]
        self.whole_loader, self.sample_loader = (
            accelerator.prepare(DataLoader(part, config.batch_size, collate_fn=collate, num_workers=config.num_workers))
            for part in (items, Subset(items, self.sample.tolist()))
        )

    def on_all(self, model: nn.Module) -> tuple[Figures, Figures]:
        """The figures on all images, and those on the sample."""
        with self.accelerator.autocast():
            columns = self.evaluate.by_image(self.host.as_saved(model), self.whole_loader)
            return self.evaluate.summarise(columns), self.evaluate.summarise(columns, self.sample)

    def on_sample(self, model: nn.Module) -> Figures:
        """The figures on the sample."""
        with self.accelerator.autocast():
            return self.evaluate(self.host.as_saved(model), self.sample_loader)


def costs_of(models: dict[str, nn.Module], batch: Images, accelerator: Accelerator) -> dict[str, Figures]:
    """Size and speed of some models, ``teacher`` among them, on one batch, by name."""
    speed = throughput(models, batch, accelerator.autocast)
    return {
        name: {
            "parameters": count_parameters(model),
            "gflops": gflops(model),
            "images_per_second": speed[name],
            "speedup": speed[name] / speed["teacher"],
        }
        for name, model in models.items()
    }
