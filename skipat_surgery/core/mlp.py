"""The MLP of a block: the Linears that make its hidden units and the one that reads them, and units taken out of it."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from .family import Family


@dataclass(frozen=True)
class Mlp:
    """Where the hidden units of a block are.

    Args:
        makers: From the block, the paths of the Linears that make them: one, or two where the MLP is gated.
        reader: From the block, the path of the Linear that reads them.
    """

    makers: tuple[str, ...]
    reader: str

    @classmethod
    def of(cls, tower: nn.Module, family: Family, index: int) -> Mlp:
        """The MLP of a block of a tower, cut or not.

        Raises:
            ValueError: It has none, or several, or something in it sees all hidden units together.
        """
        block, tokens = family.block_list(tower)[index], family.stage_of(tower, index).width
        others = {
            path: module
            for path, module in block.named_modules()
            if not f"{path}.".startswith((f"{family.attention}.", "phi."))
        }
        linears = {path: module for path, module in others.items() if type(module) is nn.Linear}
        readers = [path for path, linear in linears.items() if linear.out_features == tokens]
        found = {reader: _makers(linears, reader) for reader in readers}
        pairs = {reader: makers for reader, makers in found.items() if makers}
        if len(pairs) > 1:  # as many hidden units as channels: either could read the other
            order = list(linears)
            pairs = {r: makers for r, makers in pairs.items() if order.index(r) > max(map(order.index, makers))}
        if len(pairs) != 1:
            raise ValueError(f"this {type(block).__name__} has no MLP of plain Linears, or several")
        ((reader, makers),) = pairs.items()
        hidden = linears[reader].in_features
        wide = [
            f"{path}.{name}"
            for path, module in others.items()
            if hidden != tokens and path not in (reader, *makers)
            for name, parameter in module.named_parameters(recurse=False)
            if hidden in parameter.shape
        ]
        if wide:
            raise ValueError(
                f"the hidden units of this {type(block).__name__} pass {wide[0]} together: none can be taken out"
            )
        return cls(makers, reader)

    def width(self, block: nn.Module) -> int:
        """The number of hidden units."""
        return int(attrgetter(self.reader)(block).in_features)

    def keep(self, block: nn.Module, kept: Tensor) -> dict[str, nn.Module | None]:
        """Keep some hidden units (n,), by their numbers, and return the Linears that had all of them, by slot."""
        before: dict[str, nn.Module | None] = {path: attrgetter(path)(block) for path in (*self.makers, self.reader)}
        width = self.width(block)
        for path, linear in before.items():
            assert isinstance(linear, nn.Linear)
            packed = path != self.reader and linear.out_features == 2 * width  # of a gated MLP, in one Linear
            rows = torch.cat([kept, kept + width]) if packed else kept
            put(block, path, _part(linear, columns=kept) if path == self.reader else _part(linear, rows=rows))
        return before

    def widen(self, block: nn.Module, width: int) -> None:
        """Give a block on the meta device so many hidden units."""
        before = self.width(block)
        for path in (*self.makers, self.reader):
            linear: Any = attrgetter(path)(block)
            rows, columns = linear.out_features, linear.in_features
            if path == self.reader:
                columns = width
            else:
                rows = rows // before * width
            kind = {"device": "meta", "dtype": linear.weight.dtype}
            put(block, path, nn.Linear(columns, rows, linear.bias is not None, **kind))


def _makers(linears: dict[str, nn.Linear], reader: str) -> tuple[str, ...]:
    """The Linears whose outputs a Linear could read: of its width, or twice that, where a gate is packed with them."""
    last = linears[reader]
    return tuple(
        path
        for path, linear in linears.items()
        if path != reader
        and linear.in_features == last.out_features
        and linear.out_features in (last.in_features, 2 * last.in_features)
    )


def _part(linear: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Linear:
    """A Linear with some of the rows and columns of another's weight, on its device and in its dtype and mode."""
    weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    if rows is not None:
        rows = rows.to(weight.device)
        weight, bias = weight[rows], None if bias is None else bias[rows]
    if columns is not None:
        weight = weight[:, columns.to(weight.device)]
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight.clone(), linear.weight.requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(bias.clone(), linear.bias.requires_grad)
    return made.train(linear.training)


def put(block: nn.Module, slot: str, module: nn.Module | None) -> None:
    """Put a module, or None, into a slot of a block or of a part of it."""
    part, _, name = slot.rpartition(".")
    setattr(block.get_submodule(part), name, module)
