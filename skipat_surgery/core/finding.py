"""Which models can be cut: the families of each host library, and the search for one in a model."""

from __future__ import annotations

import copyreg
from collections.abc import Callable

from torch import nn

from .family import Family
from .timm_families import FAMILIES as TIMM_FAMILIES
from .timm_families import REFUSED as TIMM_REFUSED
from .transformers_families import FAMILIES as TRANSFORMERS_FAMILIES
from .transformers_families import REFUSED as TRANSFORMERS_REFUSED

FAMILIES: tuple[Family, ...] = (*TRANSFORMERS_FAMILIES, *TIMM_FAMILIES)
REFUSED = {**TRANSFORMERS_REFUSED, **TIMM_REFUSED}


class UnsupportedModelError(ValueError):
    """The model is of no supported family, or is in a form that cannot be cut."""


def family_named(name: str) -> Family:
    """The family of this name."""
    return next(family for family in FAMILIES if family.name == name)


def _reduce(family: Family) -> tuple[Callable[[str], Family], tuple[str]]:
    return family_named, (family.name,)


# Its functions cannot be pickled; a family is found again by its name.
copyreg.pickle(Family, _reduce)


def dotted(cls: type) -> str:
    """``module.QualifiedName`` of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def is_a(module: nn.Module, path: str) -> bool:
    """Whether the module is of the class at this dotted path, or of a subclass."""
    return any(dotted(cls) == path for cls in type(module).__mro__)


def supported() -> str:
    """The supported families, by host library, for error messages."""
    hosts = {"transformers": TRANSFORMERS_FAMILIES, "timm": TIMM_FAMILIES}
    lists = {host: ", ".join(family.name.removesuffix(f" ({host})") for family in hosts[host]) for host in hosts}
    return "; ".join(f"{host}'s {names}" for host, names in lists.items())


def families_of(module: nn.Module) -> list[Family]:
    """The families whose tower this module may be, those of the most specific class; empty where it is no tower."""
    for cls in type(module).__mro__:
        found = [family for family in FAMILIES if dotted(cls) in family.towers]
        if found:
            return found
    return []


def find_tower(model: nn.Module) -> tuple[str, nn.Module, Family]:
    """The one tower in a model: (path, tower, family).

    Raises:
        UnsupportedModelError: There is none, there are several, or this one cannot be cut; with the reason.
    """
    found = [(path, module) for path, module in model.named_modules() if families_of(module)]
    if not found:
        raise UnsupportedModelError(_why_none(model))
    if len(found) > 1:
        listed = ", ".join(f"{path or '(root)'} ({type(module).__name__})" for path, module in found)
        raise UnsupportedModelError(
            f"{type(model).__name__} holds several vision transformers: {listed}. Pass the one to cut, such as "
            f"model.get_submodule({found[0][0]!r})"
        )
    path, tower = found[0]
    return path, tower, check_tower(tower)


def check_tower(tower: nn.Module) -> Family:
    """The family of a tower, by its blocks.

    Raises:
        UnsupportedModelError: Its blocks are of another class, or the family refuses this model.
    """
    families = families_of(tower)
    blocks = families[0].block_list(tower)
    fitting = [family for family in families if all(is_a(block, family.block) for block in blocks)]
    if not fitting:
        allowed = " or ".join(family.block.rpartition(".")[2] for family in families)
        found = sorted({type(block).__name__ for block in blocks})
        raise UnsupportedModelError(
            f"the blocks of this {type(tower).__name__} are {found}, which fuse or rearrange the attention; they can "
            f"be cut where all are {allowed}. Supported: {supported()}"
        )
    reason = fitting[0].refuse(tower)
    if reason is not None:
        raise UnsupportedModelError(f"this {type(tower).__name__} cannot be cut: {reason}")
    return fitting[0]


def _why_none(model: nn.Module) -> str:
    for module in model.modules():
        for mark, reason in REFUSED.items():
            if dotted(type(module)).startswith(mark):
                return f"{type(model).__name__} cannot be cut: {reason}. Supported: {supported()}"
    return f"{type(model).__name__} holds no vision transformer that can be cut. Supported: {supported()}"
