"""Muon on whatever device: torch's own works in bfloat16, in which a CPU without AVX512 is a hundred times slower.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024: the momentum of a matrix, orthogonalised
by five steps of a Newton-Schulz iteration, is its update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..precision import multiplies_bf16


class Muon(torch.optim.Muon):
    """torch's Muon, at rates that match AdamW's; in float32 where a device does not multiply bfloat16.

    Its state is that of torch's, so that a run may go on on another machine.

    Args:
        params: Matrices.
        lr: Rate, of updates whose entries have about the size of AdamW's.
        weight_decay: Decoupled.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update each matrix that has a gradient, and return what the closure gives."""
        if all(multiplies_bf16(p.device) for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p.grad))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
                update = orthogonalised(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])
        return loss


def orthogonalised(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float = 1e-7) -> Tensor:
    """A matrix with its singular values s brought near one, each by s ← a·s + b·s³ + c·s⁵, from s over the norm on.

    Args:
        matrix: (D_y, D_x).
        coefficients: a, b, c.
        steps: How often.
        eps: The least norm to divide by.
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T.float() if tall else matrix.float()
    with torch.autocast(x.device.type, enabled=False):
        x = x / x.norm().clamp(min=eps)
        for _ in range(steps):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)
