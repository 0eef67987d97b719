"""Patch tokens as colours: the first three principal components of one model's, for any model to be compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHANNELS = 3
# The share of tokens that may lie beyond the darkest and the brightest: a few outliers would turn the rest grey.
BEYOND = 0.01


@dataclass(frozen=True)
class TokenColours:
    """A projection of tokens (…, D) to red, green and blue.

    Args:
        mean: (D,) of the tokens that it was fitted on.
        components: (D, 3), their first principal components, each of length 1.
        darkest: (3,) what is shown as 0.
        brightest: (3,) what is shown as 1.

    Examples:
        >>> tokens = torch.randn(8, 196, 64)
        >>> colours = TokenColours.fit(tokens)
        >>> colours(tokens).shape
        torch.Size([8, 196, 3])
    """

    mean: Tensor
    components: Tensor
    darkest: Tensor
    brightest: Tensor

    @classmethod
    def fit(cls, tokens: Tensor) -> TokenColours:
        """The projection of tokens (…, D), in float64 on the CPU.

        A component may point either way; here its largest entry is positive, so that colours can be had again.

        Raises:
            ValueError: Tokens of fewer than three entries have no three components.
        """
        rows = tokens.detach().double().cpu().flatten(0, -2)
        if rows.shape[1] < CHANNELS:
            raise ValueError(f"colours need tokens of at least {CHANNELS} entries, got {rows.shape[1]}")
        mean = rows.mean(dim=0)
        centred = rows - mean
        _, vectors = torch.linalg.eigh(centred.T @ centred)  # the least first
        components = vectors[:, -CHANNELS:].flip(1)
        largest = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
        components = components * largest.sign()
        shares = torch.tensor([BEYOND, 1 - BEYOND], dtype=torch.float64)
        darkest, brightest = (centred @ components).quantile(shares, dim=0)
        return cls(mean, components, darkest, brightest)

    def __call__(self, tokens: Tensor) -> Tensor:
        """The colours (…, 3) of tokens (…, D), from 0 to 1."""
        projected = (tokens.detach().double().cpu() - self.mean) @ self.components
        span = (self.brightest - self.darkest).clamp_min(torch.finfo(torch.float64).tiny)
        return ((projected - self.darkest) / span).clamp(0, 1)
