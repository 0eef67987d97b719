"""Which precisions a device works in."""

from __future__ import annotations

import torch


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices itself; a CPU without AVX512 is a hundred times slower in them."""
    if device.type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
