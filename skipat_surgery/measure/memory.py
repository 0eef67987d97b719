"""The memory that a model takes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ..core.cutting import records_of
from ..tower import Tower


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call has allocated at its peak, beyond what was there before.

    Torch's own allocations, the kernels' workspaces among them; not what a library such as oneDNN takes for itself. On
    a CPU they are read from the profiler.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event["args"] for event in events if event["name"] == "[memory]"]
    if not changes:
        return 0
    before = changes[0]["Total Allocated"] - changes[0]["Bytes"]
    return max(change["Total Allocated"] for change in changes) - before


def training_step(model: nn.Module, images: Tensor, tower: Tower) -> None:
    """One forward and backward of any model that takes images as this tower does; its gradients are dropped again."""
    output = tower.run(images, model)
    tensors = [output] if isinstance(output, Tensor) else list(dict(output).values())
    first = next(value for value in tensors if isinstance(value, Tensor) and value.requires_grad)
    del output, tensors
    first.float().square().mean().backward()
    model.zero_grad(set_to_none=True)


def weight_bytes(model: nn.Module) -> int:
    """What the parameters and buffers of a model take, with those that a cut model keeps for `restore`."""
    kept = [
        module
        for _, _, record in records_of(model)
        for slots in (record.removed or {}).values()
        for module in slots.values()
        if module is not None
    ]
    return sum(tensor.nbytes for module in (model, *kept) for tensor in (*module.parameters(), *module.buffers()))
