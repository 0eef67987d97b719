"""Models of images and text: their images' embeddings, and the classes that texts make of these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .classification import top1
from .embedding import Embedding
from .task import Head
from .wrapping import unwrapped


class ImageFeatures(nn.Module):
    """A contrastive model as a module of images alone, which DDP and its like can wrap."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, **others: Tensor) -> Any:
        """What ``get_image_features`` gives of images (B, C, H, W), or of patches and what tells their grids."""
        return self.model.get_image_features(pixel_values=images, **others)


class Contrastive(Embedding):
    """The image embedding (B, D) of a model that compares images with texts: CLIP, SigLIP, AIMv2."""

    def called(self, model: nn.Module) -> nn.Module:
        """`ImageFeatures` of the model."""
        return model if isinstance(unwrapped(model), ImageFeatures) else ImageFeatures(unwrapped(model))

    def read(self, output: Any) -> dict[str, Tensor]:
        """``embedding`` (B, D)."""
        return {"embedding": output if isinstance(output, Tensor) else output.pooler_output}


class ZeroShot(Contrastive):
    """The same, and the class of each image: the text whose embedding is nearest by its direction.

    Args:
        texts: A text for each class.
        embedding: Of the texts (classes, D), by the untouched model, which stays what it is.
    """

    name = "zero-shot classification"
    by_label, labelled_by = ("top1",), "class"

    def __init__(self, texts: Sequence[str], embedding: Tensor) -> None:
        self.texts, self.embedding = tuple(texts), embedding

    def logits(self, head: Head) -> Tensor:
        """The cosine (B, classes) of each image with each text."""
        images = F.normalize(head["embedding"], dim=-1)
        return images @ F.normalize(self.embedding.to(images), dim=-1).T

    def figures(self, found: Head, expected: Head) -> dict[str, Tensor]:
        """``embedding_cosine``, and ``agreement`` of the classes."""
        mine, theirs = (self.logits(head).argmax(dim=-1) for head in (found, expected))
        return {**super().figures(found, expected), "agreement": (mine == theirs).float()}

    def against_labels(self, head: Head, labels: Any) -> tuple[dict[str, Tensor], Tensor]:
        """``top1``."""
        return top1(self.logits(head), labels)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ZeroShot):
            return False
        return self.texts == other.texts and torch.equal(self.embedding, other.embedding)

    __hash__ = Contrastive.__hash__
