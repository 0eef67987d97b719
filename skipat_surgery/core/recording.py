"""Whether a graph is being made of what runs."""

from __future__ import annotations

import torch


def is_recorded() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace is recording: Python then runs once, for every later run.

    torch.jit.trace compares a graph made with gradients to one made without, so that both must come out alike.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
