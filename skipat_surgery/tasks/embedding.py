"""Image embeddings: a vector for each image, of which the direction counts."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .task import Head, Task


class Embedding(Task):
    """A vector (B, D) for each image: timm's models without classes, transformers' vision towers with a projection."""

    name = "image embedding"

    def read(self, output: Any) -> dict[str, Tensor]:
        """``embedding`` (B, D)."""
        return {"embedding": output if isinstance(output, Tensor) else output.image_embeds}

    def distance(self, found: Head, expected: Head, temperature: float = 1.0) -> Tensor:
        """1 - cosine."""
        return 1 - F.cosine_similarity(found["embedding"], expected["embedding"], dim=-1)

    def figures(self, found: Head, expected: Head) -> dict[str, Tensor]:
        """``embedding_cosine``."""
        return {"embedding_cosine": F.cosine_similarity(found["embedding"], expected["embedding"], dim=-1)}
