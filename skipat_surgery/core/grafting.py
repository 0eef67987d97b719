"""Joining a mixin with the class of a module that exists, and taking it off again.

The joined class keeps the host's name, as accelerate and FSDP match classes by name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from torch import nn

Function = TypeVar("Function", bound=Callable[..., Any])


class Grafted:
    """Base of the mixins: pickle and deepcopy rebuild the joined class from its parts."""

    grafted_from: tuple[type, type]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        how: Any = super().__reduce_ex__(max(protocol, 2))
        mixins, cls = [], type(self)
        while issubclass(cls, Grafted):
            mixin, cls = cls.grafted_from
            mixins.append(mixin)
        return _rebuild, (cls, *reversed(mixins)), *how[2:]


def cached(function: Function) -> Function:
    """`functools.cache` for functions of classes, which mypy does not take for hashable."""
    return cache(function)  # type: ignore[return-value]


@cached
def _grafted(mixin: type, host: type) -> type:
    names = {"__module__": host.__module__, "__qualname__": host.__qualname__, "grafted_from": (mixin, host)}
    return type(host.__name__, (mixin, host), names)


def graft(module: nn.Module, mixin: type[Grafted]) -> None:
    """Make a module, in place, an instance of its own class with a mixin in front."""
    vars(module).pop("forward", None)  # accelerate, taken off, leaves the class's own forward on the instance
    module.__class__ = _grafted(mixin, type(module))


def ungraft(module: nn.Module) -> None:
    """Undo every `graft`."""
    while isinstance(module, Grafted):
        module.__class__ = module.grafted_from[1]


def _rebuild(cls: type, *mixins: type) -> nn.Module:
    for mixin in mixins:
        cls = _grafted(mixin, cls)
    return object.__new__(cls)
