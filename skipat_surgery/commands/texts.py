"""The texts of classes: embedded by the untouched model, and what of each names its class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from ..observing import evaluating
from ..tasks.contrastive import Contrastive, ZeroShot
from .loading import LoadedModel


def parse_texts(given: str) -> list[str]:
    """``"a photo of a cat, a photo of a dog"`` as a list.

    Raises:
        ValueError: There are fewer than two, or two alike.
    """
    texts = [text.strip() for text in given.split(",")]
    if len(texts) < 2 or "" in texts or len(set(texts)) < len(texts):
        raise ValueError(
            f"--texts takes a text for each class, with commas between them, two that differ or more: {given!r}"
        )
    return texts


def zero_shot(host: LoadedModel, name: str, texts: Sequence[str]) -> ZeroShot:
    """The task of a contrastive model whose images are put into classes by texts.

    Args:
        host: The untouched model.
        name: What it was loaded by; its tokenizer lies there.
        texts: A text for each class.

    Raises:
        ValueError: The model takes no texts, or there is no tokenizer beside it that tells them apart.
    """
    if not isinstance(host.task, Contrastive):
        raise ValueError(
            f"--texts needs a model of images and texts, such as CLIPModel, got {type(host.model).__name__}"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--texts needs the tokenizer of {name}, which cannot be loaded: {error}") from error
    if len({tuple(tokenizer(text)["input_ids"]) for text in texts}) < len(texts):
        raise ValueError(
            f"--texts needs the tokenizer of {name}, and the one that lies there makes the same of two texts"
        )
    return ZeroShot(texts, text_embedding(host.model, tokenizer, texts))


def text_embedding(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """The embeddings (texts, D) of texts, padded to the model's length, as SigLIP was trained to see them."""
    longest = model.config.text_config.max_position_embeddings
    tokens = tokenizer(list(texts), padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
    given = {
        key: tokens[key].to(next(model.parameters()).device) for key in ("input_ids", "attention_mask") if key in tokens
    }
    with evaluating(model), torch.no_grad():
        found = model.get_text_features(**given)
    return (found if isinstance(found, Tensor) else found.pooler_output).float().cpu()
