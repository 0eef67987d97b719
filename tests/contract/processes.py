"""What the two processes of the distributed tests do, for every family in turn."""

from __future__ import annotations

import copy
import json
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from cases import Case, case_named
from models import assert_same, cut_of, gradients
from small_models import DEPTH, EXACT, EXACT_STEPS
from torch import Tensor, nn

STEPS, RATE = 3, 0.01


def run(rank: int, folder: str, names: list[str]) -> None:
    """Run both checks on the cases of these names, on the stock model too where they fail, and write what became of
    them."""
    torch.set_num_threads(1)
    for name, function in {**EXACT, **EXACT_STEPS}.items():
        with suppress(ImportError):  # of a model that is newer than its host
            mock.patch(name, function).start()  # as in the tests of one process
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {}
    for check in (data_parallel, fully_sharded):
        for case in map(case_named, names):
            found = outcome(check, case, rank, cut_of)
            if found and not outcome(check, case, rank, copy.deepcopy):
                results[f"{check.__name__} {case.name}"] = found
            else:
                results[f"{check.__name__} {case.name}"] = "the stock model fails too" if found else ""
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


Check = Callable[[Case, int, Callable[[nn.Module], nn.Module]], None]


def outcome(check: Check, case: Case, rank: int, cut: Callable[[nn.Module], nn.Module]) -> str:
    """What a check raised in either process, which both are told; empty where it passed."""
    found = ""
    try:
        check(case, rank, cut)
    except Exception:
        found = f"rank {rank}: {traceback.format_exc()}"
    everyone: list[str] = ["", ""]
    dist.all_gather_object(everyone, found)
    return "".join(everyone)


def loss_of(case: Case, model: nn.Module, images: Tensor) -> Tensor:
    return sum(out.square().mean() for out in case.tensors(model, images))  # type: ignore


def train(case: Case, model: nn.Module, batches: list[Tensor]) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], RATE)
    torch.manual_seed(0)  # DINOv3 jitters its rope in training
    for images in batches:
        optimizer.zero_grad()
        loss_of(case, model, images).backward()
        optimizer.step()


def data_parallel(case: Case, rank: int, cut: Callable[[nn.Module], nn.Module]) -> None:
    """DDP with find_unused_parameters=False equals one process with the joint batch."""
    stock = case.model()
    used = gradients(case, stock, case.images()).keys()
    alone, shared = cut(stock), cut(stock)
    for model in (alone, shared):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".phi." in f".{name}" or name in used)  # what the stock model never uses is frozen
    joint = [case.images(batch=4, seed=seed) for seed in range(STEPS)]
    train(case, alone, joint)
    wrapped = nn.parallel.DistributedDataParallel(shared, find_unused_parameters=False)
    train(case, wrapped, [images[2 * rank : 2 * rank + 2] for images in joint])
    assert_same(dict(shared.named_parameters()), dict(alone.named_parameters()), atol=1e-10, rtol=1e-8)


def fully_sharded(case: Case, rank: int, cut: Callable[[nn.Module], nn.Module]) -> None:
    """FSDP2 on every block and the whole, with checkpointing: the forward and one step equal the plain model's."""
    from torch.distributed.fsdp import fully_shard

    stock = case.model()
    plain, sharded = cut(stock), cut(stock)
    if case.is_timm:
        sharded.set_grad_checkpointing()
    elif case.host == "transformers" and sharded.supports_gradient_checkpointing:  # EoMT has none
        sharded.gradient_checkpointing_enable({"use_reentrant": False})
    mesh = dist.init_device_mesh("cpu", (2,))
    for index in range(DEPTH):
        fully_shard(sharded.get_submodule(case.block(index)), mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    images = case.images(batch=4)
    mine = images[2 * rank : 2 * rank + 2]
    with torch.no_grad():
        assert_same(case.tensors(sharded, mine), case.tensors(plain, mine), atol=1e-10, rtol=1e-8)
    sharded.reshard()  # a forward without backward leaves the root's parameters whole
    # Training mode turns checkpointing on; dropout would draw otherwise than in the plain model.
    for model in (plain, sharded):
        for module in model.train().modules():
            if "drop" in type(module).__name__.lower():
                module.eval()
    train(case, plain, [images])
    train(case, sharded, [mine])
    full = {name: parameter.full_tensor() for name, parameter in sharded.named_parameters()}
    assert_same(full, dict(plain.named_parameters()), atol=1e-10, rtol=1e-8)
