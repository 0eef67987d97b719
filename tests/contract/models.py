"""What the tests of the contract have in common: cutting a case, and what it must equal."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import reference
import torch
from cases import Case
from small_models import DEPTH
from torch import Tensor, nn

import skipat_surgery
from skipat_surgery import PhiConfig
from skipat_surgery.core.config import SkipatConfig
from skipat_surgery.core.windowed_phis import suited
from skipat_surgery.tower import Tower

SKIP = (2, 3, 5)  # two runs, one of which ends at the last block
PHIS = dict.fromkeys(SKIP, PhiConfig()) | {5: PhiConfig(queries="patches")}
KINDS_OF_PHI = {
    "default": PhiConfig(),
    "patches ask": PhiConfig(queries="patches"),
    "paper": PhiConfig.paper(),
    "mix": PhiConfig(prefix="mix", expansion=0.125),
}


def randomised(model: nn.Module) -> nn.Module:
    """The model with random Φ, so that no part of it is idle as it is in a fresh one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".phi." in f".{name}":
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def cut_of(stock: nn.Module, skip: Iterable[int] = SKIP, phi: PhiConfig | None = None) -> nn.Module:
    """A cut copy with random Φ, without clusters where blocks attend within windows."""
    which = PHIS if skip is SKIP and phi is None else skip
    tower = Tower.of(stock)
    config = suited(tower.module, tower.family, SkipatConfig.parse(which, phi))
    return randomised(skipat_surgery.apply(copy.deepcopy(stock), config.phi))


def cases_that_use(request: pytest.FixtureRequest) -> list[Case]:
    """The cases of the chosen tests of a module whose fixture asks, but for those that the host is too old for."""
    own = [item for item in request.session.items if item.nodeid.startswith(f"{request.node.nodeid}::")]
    items = [item for item in own if request.fixturename in getattr(item, "fixturenames", ())]
    cases = {item.callspec.params["case"].name: item.callspec.params["case"] for item in items}  # type: ignore
    return [case for case in cases.values() if not case.is_too_new]


def skipped_blocks(case: Case, cut: nn.Module) -> dict[int, nn.Module]:
    """The blocks of a cut model that have a Φ."""
    blocks = {i: cut.get_submodule(case.block(i)) for i in range(DEPTH)}
    return {i: block for i, block in blocks.items() if hasattr(block, "phi")}


def phi_weights(case: Case, cut: nn.Module) -> dict[int, dict[str, Tensor]]:
    """Copies of the weights of each Φ, by block."""
    return {i: reference.phi_weights(block) for i, block in skipped_blocks(case, cut).items()}


def equations(
    case: Case, stock: nn.Module, cut: nn.Module, images: Tensor, weights: dict[int, dict[str, Tensor]] | None = None
) -> AbstractContextManager[nn.Module]:
    """The stock model, computing what the cut one should."""
    weights = weights or phi_weights(case, cut)
    phis = {i: block.phi for i, block in skipped_blocks(case, cut).items()}
    attends = {i for i, phi in phis.items() if phi.attends}  # their prefix and suffix tokens
    pools = {i: phi.pool for i, phi in phis.items() if phi.pool}
    asking = {i for i, phi in phis.items() if phi.queries == "patches"}
    shape = case.layout(images), case.prefix, case.suffix
    how = attends, pools, asking, case.merge, case.window, case.grids(images), case.folded, case.units
    return reference.paper_equations(stock, case.msa, DEPTH, weights, *shape, *how)


def unless_the_stock_model_fails_too(case: Case, check: Callable[[nn.Module], Any]) -> None:
    """Run a check on the cut model; where it fails, and fails on the stock model as well, say so and skip."""
    try:
        check(cut_of(case.model()))
    except Exception as error:
        try:
            check(case.model())
        except Exception as stock:
            pytest.skip(f"the stock model fails too: {type(stock).__name__}: {stock}")
        raise error


def gradients(case: Case, model: nn.Module, *batches: Tensor) -> dict[str, Tensor]:
    """Of the mean squared output, summed over batches whose forwards all come before the backward."""
    model.zero_grad()
    torch.manual_seed(0)
    sum(out.square().mean() for images in batches for out in case.tensors(model, images)).backward()  # type: ignore
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def skip_unless_trainable(case: Case, used: Iterable[str]) -> None:
    """Skip where none of the parameters that get a gradient is in a block: CLIPSeg runs its vision tower without."""
    block = case.block(3)
    if not any(name.startswith(f"{block}.") for name in used):
        pytest.skip("the stock model runs its blocks without gradients")


def assert_same(found: Any, expected: Any, **tolerance: float) -> None:
    """Tensors by value, lists and mappings entry by entry."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
        return
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)
