"""Our model card in the place of the one that transformers' Trainer writes over it."""

from __future__ import annotations

from functools import wraps
from typing import Any

from transformers.modelcard import TrainingSummary

from .core.modeling import SkipatPreTrainedModel

TRAINING = "## Training procedure"


class SkipatTrainingSummary(TrainingSummary):
    """The Trainer's summary of the training of a cut model: its card, with what the Trainer did at its end."""

    model: SkipatPreTrainedModel

    def to_model_card(self) -> str:
        """The card in Markdown."""
        _, mark, training = super().to_model_card().partition(TRAINING)
        return f"{self.model.card().rstrip()}\n\n{mark}{training}" if mark else self.model.card()


def keep_card() -> None:
    """Have ``Trainer.create_model_card`` keep the card of a cut model. Doing it again changes nothing.

    Source: transformers, ``Trainer.create_model_card``, which writes whatever ``TrainingSummary.from_trainer`` gives.
    """
    stock: Any = TrainingSummary.from_trainer.__func__  # type: ignore[attr-defined]
    if hasattr(stock, "skipat_wraps"):
        return

    @wraps(stock)
    def from_trainer(cls: type[TrainingSummary], trainer: Any, *args: Any, **kwargs: Any) -> TrainingSummary:
        summary: TrainingSummary = stock(cls, trainer, *args, **kwargs)
        model = trainer.accelerator.unwrap_model(trainer.model)
        if isinstance(model, SkipatPreTrainedModel):
            summary.__class__ = SkipatTrainingSummary
            summary.model = model  # type: ignore[attr-defined]
        return summary

    from_trainer.skipat_wraps = stock  # type: ignore[attr-defined]
    TrainingSummary.from_trainer = classmethod(from_trainer)  # type: ignore[method-assign, assignment]
