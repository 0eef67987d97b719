"""The last linear map on the way to some tokens: what a refit may change so that they change linearly with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# How far from linear, as a share, rounding in bfloat16 may look; behind a norm it is above a half.
OFF = 2e-2


def last_linear(candidates: set[nn.Module], run: Callable[[], Tensor]) -> tuple[nn.Linear, Tensor] | None:
    """The last linear map on the way to some tokens (B, N, D), and by how much each channel of its output counts there
    (D,): LayerScale.

    None where they do not follow its output linearly, as in post-norm blocks. Found by running, with the output of the
    map shifted.

    Args:
        candidates: The modules it may be among.
        run: Gives the tokens.
    """
    called: list[nn.Linear] = []
    linears = [module for module in candidates if type(module) is nn.Linear]
    hooks = [m.register_forward_hook(lambda m, args, out: called.append(m)) for m in linears]
    try:
        x = run()
    finally:
        for hook in hooks:
            hook.remove()
    if not called or called.count(called[-1]) > 1 or called[-1].out_features != x.shape[-1]:
        return None
    linear = called[-1]
    unit = float(x.std())
    with _shifted(linear, torch.full_like(x[0, 0], unit)):
        scale = (run() - x).double().mean(dim=(0, 1)) / unit
    draw = torch.Generator().manual_seed(0)
    shift = unit * torch.randn(x.shape[-1], generator=draw).to(x.device, x.dtype)
    with _shifted(linear, shift):
        moved = (run() - x).double()
    # As a whole: where tokens hold values far above the others', as DINOv2's do, those alone are rounded by more.
    linearly = bool((moved - scale * shift).norm() <= OFF * moved.norm())
    return (linear, scale.to(x.dtype)) if linearly else None


@contextmanager
def _shifted(linear: nn.Linear, shift: Tensor) -> Iterator[None]:
    hook = linear.register_forward_hook(lambda module, args, output: output + shift)
    try:
        yield
    finally:
        hook.remove()
