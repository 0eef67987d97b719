"""The paper's equations where hidden states are 2-D maps, of which a block's MSA may be given windows.

Written plainly, and sharing no code with the library: a window is a list of places, and relative positions are looked
up place by place.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from contextlib import ExitStack
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def windows(grid: tuple[int, ...], side: int) -> Tensor:
    """(n, side, side), the place in the grid of each place of each window; H·W beyond its edges."""
    height, width = grid
    rows, columns = -(-height // side), -(-width // side)
    places = torch.full((rows * side, columns * side), height * width)
    places[:height, :width] = torch.arange(height * width).view(grid)
    return torch.stack(
        [
            places[row * side : (row + 1) * side, column * side : (column + 1) * side]
            for row in range(rows)
            for column in range(columns)
        ]
    )


def tokens(made: Tensor, grid: tuple[int, ...]) -> Tensor:
    """What an MSA gives, a map (B, H, W, D) or its windows, as tokens (B, H·W, D)."""
    if made.shape[1:3] == grid:
        return made.reshape(made.shape[0], -1, made.shape[3])
    places = windows(grid, made.shape[1]).flatten()
    by_place = made.reshape(-1, len(places), made.shape[3])
    out = made.new_zeros(by_place.shape[0], grid[0] * grid[1] + 1, made.shape[3])
    return out.index_copy(1, places, by_place)[:, :-1]


def like(made: Tensor, x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Tokens (B, H·W, D) laid out as another tensor is: a map, or windows, with zeros beyond the edges of the grid."""
    if x.shape[1:3] == grid:
        return made.reshape(x.shape)
    return F.pad(made, (0, 0, 0, 1))[:, windows(grid, x.shape[1])].reshape(x.shape)


def at_clusters(msa: nn.Module, args: tuple, kwargs: dict, seed: Tensor, grid: tuple[int, ...], ask: bool) -> Tensor:
    """Z (B, H·W, D) of a map whose patches give way to the mean of their cluster, and lie where its seed (B, H·W) lies,
    by the host's own MSA; the patches may ask by themselves, as in `reference.at_clusters`."""
    h, *positional = args or (kwargs["hidden_states"],)
    others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    found = [_of_one(msa, image[None], own, positional, others, grid, ask) for image, own in zip(h, seed, strict=True)]
    return torch.cat(found)


def _of_one(
    msa: nn.Module, h: Tensor, seed: Tensor, args: list, kwargs: dict, grid: tuple[int, ...], ask: bool
) -> Tensor:
    from reference import _masked, averaging

    count = len(seed)
    h = h.reshape(1, count, -1)
    mean = averaging(seed[None])[0].to(h.dtype) @ h
    lie = torch.cat([seed, torch.arange(count)]) if ask else seed
    given = torch.cat([mean, h], dim=1) if ask else mean
    args = [tuple(part[..., lie, :] for part in arg) if isinstance(arg, tuple) else arg for arg in args]
    with ExitStack() as undo:
        for module in msa.modules():  # the host must not take this run's attention maps for the block's own
            undo.callback(setattr, module, "_forward_hooks", module._forward_hooks)
            module._forward_hooks = OrderedDict()
        if ask:
            unseen = h.new_zeros(len(lie), len(lie)).index_fill(1, torch.arange(count, len(lie)), -torch.inf)
            undo.enter_context(_masked(unseen))
        _place(msa, lie, grid, undo)
        out = msa.forward(given[:, :, None], *args, **kwargs)
    out = (out[0] if isinstance(out, tuple) else out)[:, :, 0]
    return out[:, count:] if ask else out


def _place(msa: nn.Module, lie: Tensor, grid: tuple[int, ...], undo: ExitStack) -> None:
    """Have an MSA take its tokens, which it is given in one column, to lie at these places of the grid."""
    module = sys.modules[type(msa).__module__]

    def bias(query: Tensor, rows: Tensor, columns: Tensor, *sizes: object) -> Tensor:
        return distances(query, rows, columns, lie, grid)

    def added(scores: Tensor, *args: object) -> Tensor:
        return scores + bias(*args)

    for owner, name, function in (
        (msa, "get_decomposed_rel_pos", bias),
        (module, "get_decomposed_rel_pos_bias", bias),
        (module, "add_decomposed_relative_positions", added),
    ):
        if hasattr(owner, name):
            undo.enter_context(mock.patch.object(owner, name, function))
    if getattr(msa, "rope", None) is not None:
        embed = msa.rope.get_embed()[lie]
        undo.enter_context(mock.patch.object(msa.rope, "get_embed", return_value=embed))


def distances(query: Tensor, rows: Tensor, columns: Tensor, lie: Tensor, grid: tuple[int, ...]) -> Tensor:
    """q·R_h[y - y'] + q·R_w[x - x'], (B·heads, n, n), of queries (B·heads, n, d) at these places."""
    down, across = lie // grid[1], lie % grid[1]

    def along(table: Tensor, places: Tensor, length: int) -> Tensor:
        if len(table) != 2 * length - 1:
            table = F.interpolate(table.T[None], size=2 * length - 1, mode="linear")[0].T
        return table[places[:, None] - places[None] + length - 1]

    both = along(rows, down, grid[0]) + along(columns, across, grid[1])
    return torch.einsum("bid,ijd->bij", query, both)
