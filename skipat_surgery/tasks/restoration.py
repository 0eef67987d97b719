"""Pictures out of pictures: denoising, super-resolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .maps import relative_error
from .task import Head, Task


class Restoration(Task):
    """A picture (B, C, H, W) for each image: transformers' ``reconstruction``, or the output itself."""

    name = "image restoration"

    def read(self, output: Any) -> dict[str, Tensor]:
        """``picture`` (B, C, H, W)."""
        return {"picture": output if isinstance(output, Tensor) else output.reconstruction}

    def distance(self, found: Head, expected: Head, temperature: float = 1.0) -> Tensor:
        """Squared error over the variance of the teacher's picture."""
        return relative_error(found["picture"], expected["picture"])

    def figures(self, found: Head, expected: Head) -> dict[str, Tensor]:
        """``psnr`` in dB, the peak being the range of the teacher's picture; at most what float32 can tell (138 dB)."""
        mine, theirs = found["picture"].flatten(1), expected["picture"].flatten(1)
        smallest = torch.finfo(theirs.dtype).eps ** 2
        error = (mine - theirs).square().mean(dim=1)
        peak = (theirs.amax(dim=1) - theirs.amin(dim=1)).square().clamp(min=torch.finfo(theirs.dtype).tiny)
        return {"psnr": -10 * (error / peak).clamp(min=smallest).log10()}
