"""Which models can be cut: the families of each host library, and the search for one in a model."""

from __future__ import annotations

import copyreg
from collections.abc import Callable

from torch import nn

from .family import Family
from .timm_families import FAMILIES as TIMM_FAMILIES
from .timm_families import REFUSED as TIMM_REFUSED
from .torchvision_families import FAMILIES as TORCHVISION_FAMILIES
from .transformers_families import FAMILIES as TRANSFORMERS_FAMILIES
from .transformers_refusals import REFUSED as TRANSFORMERS_REFUSED

HOSTS = {"transformers": TRANSFORMERS_FAMILIES, "timm": TIMM_FAMILIES, "torchvision": TORCHVISION_FAMILIES}
FAMILIES: tuple[Family, ...] = (*TRANSFORMERS_FAMILIES, *TIMM_FAMILIES, *TORCHVISION_FAMILIES)
REGISTERED: list[Family] = []  # by users
REFUSED = {**TRANSFORMERS_REFUSED, **TIMM_REFUSED}


class UnsupportedModelError(ValueError):
    """The model is of no supported family, or is in a form that cannot be cut."""


def register(family: Family) -> Family:
    """Let models of a family of your own be cut, as the built-in ones are.

    Register it in every process that cuts, loads or unpickles such a model, before it does.

    Returns:
        The same family.

    Raises:
        ValueError: A family of this name is there already, or one whose towers and blocks are of the same classes.
        TypeError: It is no `Family`.
    """
    if not isinstance(family, Family):
        raise TypeError(f"register takes a skipat_surgery.Family, got {type(family).__name__}")
    for known in (*FAMILIES, *REGISTERED):
        if known.name == family.name:
            raise ValueError(f"there is a family named {family.name!r} already; give this one another name")
        if known.block == family.block and set(known.towers) & set(family.towers):
            raise ValueError(
                f"{known.name!r} is a family of the same towers and blocks ({family.block}); models of it can be cut"
            )
    REGISTERED.append(family)
    return family


def family_named(name: str) -> Family:
    """The family of this name.

    Raises:
        KeyError: There is none.
    """
    for family in (*FAMILIES, *REGISTERED):
        if family.name == name:
            return family
    raise KeyError(f"there is no family named {name!r}; one of your own must be registered first in this process")


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
    lists = {host: [family.name.removesuffix(f" ({host})") for family in families] for host, families in HOSTS.items()}
    named = [f"{host}'s {', '.join(names)}" for host, names in lists.items()]
    return "; ".join([*named, *(f"your own {family.name}" for family in REGISTERED)])


def families_of(module: nn.Module) -> list[Family]:
    """The families whose tower this module may be, those of the most specific class; empty where it is no tower."""
    for cls in type(module).__mro__:
        found = [family for family in (*FAMILIES, *REGISTERED) if dotted(cls) in family.towers]
        if found:
            return found
    return []


def find_tower(model: nn.Module, within: str | None = None) -> tuple[str, nn.Module, Family]:
    """The one tower in a model: (path, tower, family).

    Args:
        model: What holds it.
        within: Path of the tower, or of a part of the model that holds no other, where there are several.

    Raises:
        UnsupportedModelError: There is none, there are several, or this one cannot be cut; with the reason.
    """
    every = towers_in(model)
    if not every:
        raise UnsupportedModelError(_why_none(model))
    found = [(path, tower) for path, tower in every if within is None or f"{path}.".startswith(f"{within}.")]
    if len(found) != 1:
        listed = ", ".join(f"{path or '(root)'} ({type(module).__name__})" for path, module in every)
        number = "several vision transformers" if len(every) > 1 else "one vision transformer"
        raise UnsupportedModelError(
            f"{type(model).__name__} holds {number}: {listed}. Name the one to cut, such as "
            f"tower={every[0][0]!r}" + ("" if within is None else f"; {within!r} holds {len(found)}")
        )
    path, tower = found[0]
    _check_holders(model, path)
    return path, tower, check_tower(tower)


def towers_in(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The towers in a model that may be cut, as (path, tower)."""
    return [(path, module) for path, module in model.named_modules() if families_of(module)]


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
    # timm's DaViT has blocks of one class, whose parts have names in some models.
    family = next((family for family in fitting if all(map(family.has_msa, blocks))), fitting[0])
    reason = family.refuse(tower)
    if reason is not None:
        raise UnsupportedModelError(f"this {type(tower).__name__} cannot be cut: {reason}")
    return family


def _check_holders(model: nn.Module, path: str) -> None:
    """Check that nothing around a tower uses it in a way that Φ cannot follow.

    Raises:
        UnsupportedModelError: Something does.
    """
    names = path.split(".") if path else []
    for holder in (model.get_submodule(".".join(names[:end])) for end in range(len(names))):
        reason = _why_refused(holder)
        if reason is not None:
            raise UnsupportedModelError(f"{type(holder).__name__} cannot be cut: {reason}")


def _why_refused(module: nn.Module) -> str | None:
    return next((reason for mark, reason in REFUSED.items() if dotted(type(module)).startswith(mark)), None)


def _why_none(model: nn.Module) -> str:
    for reason in map(_why_refused, model.modules()):
        if reason is not None:
            return f"{type(model).__name__} cannot be cut: {reason}. Supported: {supported()}"
    return f"{type(model).__name__} holds no vision transformer that can be cut. Supported: {supported()}"
