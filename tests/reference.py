"""The paper's equations, written plainly in float64 and sharing no code with the library.

Everything but the surgery (embeddings, MSA, norms, MLP, head) is taken from an untouched copy of the host model; Φ's
weights are taken from the cut one by name. `paper_equations` does this on any family through hooks, and the two loops,
which walk the blocks of a ViT in the open, check it.
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from types import MappingProxyType
from unittest import mock

import reference_maps as maps
import reference_stages as stages
import reference_units as in_units
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def phi(
    weights: dict[str, Tensor],
    z: Tensor,
    prefix: int,
    grid: tuple[int, ...],
    x: Tensor | None = None,
    seed: Tensor | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """Φ (paper Eq. 5-8): FC, GELU, depthwise convolution, GELU, FC, ECA on the patches; the prefix as configured.

    The FC may read LN(X), and its mean over the patches with the same seed, beside Z. Patches `count` (B, H·W): ones,
    and zeros for padding.
    """
    patches = z[:, prefix:]
    count = torch.ones(patches.shape[:2], dtype=z.dtype) if count is None else count
    share = (count / count.sum(dim=1, keepdim=True))[..., None]
    hidden = torch.einsum("bnd,hd->bnh", patches, weights["expand.weight"]) + weights["expand.bias"]
    if "expand_x.weight" in weights:
        hidden = hidden + torch.einsum("bnd,hd->bnh", x[:, prefix:], weights["expand_x.weight"])
    if "expand_clusters.weight" in weights:
        means = torch.einsum("bmn,bnd->bmd", averaging(seed, count).to(x.dtype), x[:, prefix:])
        hidden = hidden + torch.einsum("bnd,hd->bnh", means, weights["expand_clusters.weight"])
    hidden = gelu(hidden) * count[..., None]
    kernel, bias = weights["depthwise.weight"], weights["depthwise.bias"]
    sides = kernel.shape[2:]
    laid_out = hidden.reshape(z.shape[0], *grid, -1)
    around = [side // 2 for side in reversed(sides) for _ in range(2)]
    padded = torch.nn.functional.pad(laid_out, (0, 0, *around))
    convolved = bias + sum(
        padded[(slice(None), *(slice(i, i + length) for i, length in zip(at, grid, strict=True)))]
        * kernel[(slice(None), 0, *at)]
        for at in product(*map(range, sides))
    )
    hidden = gelu(convolved).reshape(z.shape[0], math.prod(grid), -1)
    out = torch.einsum("bnh,dh->bnd", hidden, weights["reduce.weight"]) + weights["reduce.bias"]
    if "eca.weight" in weights:
        left, middle, right = weights["eca.weight"].flatten()
        mean = (share * out).sum(dim=1)
        padded = torch.nn.functional.pad(mean, (1, 1))
        gate = left * padded[:, :-2] + middle * padded[:, 1:-1] + right * padded[:, 2:]
        out = out / (1 + torch.exp(-gate))[:, None, :]
    first = z[:, :prefix]
    if "mix.weight" in weights and prefix:
        mean = (share * patches).sum(dim=1, keepdim=True).repeat(1, prefix, 1)
        both = torch.cat([first, mean], dim=2)
        first = torch.einsum("bnd,ed->bne", both, weights["mix.weight"]) + weights["mix.bias"]
    return torch.cat([first, out], dim=1)


def phi_of_each(
    weights: dict[str, Tensor], z: Tensor, prefix: int, grids: list[tuple[int, ...]], x: Tensor, side: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Φ of each image alone, on its own grid; with the seed of each patch, and zeros for the padding behind them."""
    after, seed = torch.zeros_like(z), torch.zeros(len(z), z.shape[1] - prefix, dtype=torch.long)
    count = torch.zeros(z.shape[:2], dtype=z.dtype)
    for number, grid in enumerate(grids):
        image, last = slice(number, number + 1), prefix + math.prod(grid)
        count[image, :last] = 1
        if side:
            seed[image, : last - prefix] = seeds(x[image, prefix:last], grid, side)
        own = seed[image, : last - prefix]
        after[image, :last] = phi(weights, z[image, :last], prefix, grid, x[image, :last], own)
    return after, seed, count


def packed(
    msa: nn.Module,
    args: tuple,
    kwargs: dict,
    before: Tensor,
    weights: dict[str, Tensor],
    grids: list[tuple[int, ...]],
    merge: int,
    pools: Mapping[int, int],
    index: int,
    ask: bool,
    window: int = 0,
) -> Tensor:
    """Z (T, D) of packed images: each one is taken out, row by row, and put back where it was.

    Where they lie window by window, an MSA that keeps the windows apart makes clusters in each of them.
    """
    h = (args[0] if args else kwargs["hidden_states"]).flatten(0, -2)
    before, after, first = before.flatten(0, -2), torch.zeros_like(h), 0
    for grid in grids:
        height, width = grid
        table, windows = torch.zeros(height, width, dtype=torch.long), []
        place = first
        for high, low in product(range(0, height, window or height), range(0, width, window or width)):
            end, edge = min(high + (window or height), height), min(low + (window or width), width)
            for top, left in product(range(high, end, merge), range(low, edge, merge)):
                for down, right in product(range(merge), range(merge)):
                    table[top + down, left + right] = place
                    place += 1
            own = torch.arange(height * width).view(height, width)[high:end, low:edge]
            windows.append((own.flatten(), tuple(own.shape)))
        if len(kwargs.get("cu_seqlens", ())) == len(grids) + 1:  # it keeps no more than the images apart
            windows = [(torch.arange(height * width), grid)]
        rows, first = table.flatten(), place
        x, side, seed = h[rows][None], pools.get(index, 0), None
        if side:
            seed = torch.zeros(1, height * width, dtype=torch.long)
            for own, shape in windows:
                seed[0, own] = own[seeds(x[:, own], shape, side)[0]]
        made = phi(weights, before[rows][None], 0, grid, x, seed)[0]
        for own, shape in windows if side else ():
            rotation = tuple(part[rows[own]] for part in kwargs.get("position_embeddings", ()))
            coarse = packed_at_clusters(msa, x[0, own], rotation, seeds(x[:, own], shape, side)[0], ask)
            made = made.index_add(0, own, coarse)
        after = after.index_put((rows,), made)
    return after


def on_map(
    msa: nn.Module,
    args: tuple,
    kwargs: dict,
    before: Tensor,
    weights: dict[str, Tensor],
    grid: tuple[int, ...],
    side: int,
    ask: bool,
) -> Tensor:
    """Z (B, H·W, D) of a block whose MSA is given a map, or windows of it."""
    h = maps.tokens(args[0] if args else kwargs["hidden_states"], grid)
    seed = seeds(h, grid, side) if side else None
    made = phi(weights, before, 0, grid, h, seed)
    return made + maps.at_clusters(msa, args, kwargs, seed, grid, ask) if side else made


def packed_at_clusters(msa: nn.Module, h: Tensor, rotation: tuple[Tensor, ...], seed: Tensor, ask: bool) -> Tensor:
    """`at_clusters` of one image (n, D) of a packed host."""
    count = len(h)
    lie = torch.cat([seed, torch.arange(count)]) if ask else seed
    mean = averaging(seed[None])[0].to(h.dtype) @ h
    tokens = torch.cat([mean, h]) if ask else mean
    unseen = h.new_zeros(len(lie), len(lie)).index_fill(1, torch.arange(count, len(lie)), -torch.inf)
    given = {"position_embeddings": tuple(part[lie] for part in rotation)} if rotation else {}
    with ExitStack() as undo:
        for module in msa.modules():
            undo.callback(setattr, module, "_forward_hooks", module._forward_hooks)
            module._forward_hooks = OrderedDict()
        if ask:
            undo.enter_context(_masked(unseen))
        if "cu_seqlens" in inspect.signature(msa.forward).parameters:
            out = msa.forward(tokens, cu_seqlens=torch.tensor([0, len(lie)]), **given)
        else:
            out = msa.forward(tokens[None], attention_mask=None, **given)[0][0]
    return out[count:] if ask else out


def seeds(x: Tensor, grid: tuple[int, ...], side: int, count: Tensor | None = None) -> Tensor:
    """For patches (B, H·W, D), which patch is the seed of each (B, H·W): of those every `side` along each axis that are
    no padding, the one with the greatest cosine; a seed is its own."""
    places = [place for place, at in enumerate(product(*map(range, grid))) if not any(index % side for index in at)]
    length = x.square().sum(dim=2).sqrt()
    cosines = torch.einsum("bnd,bmd->bnm", x, x[:, places]) / (length[:, :, None] * length[:, None, places])
    if count is not None:
        cosines = cosines - 3 * (1 - count[:, None, places])
    found = torch.tensor(places)[cosines.argmax(dim=2)]
    found[:, places] = torch.tensor(places)
    return found


def averaging(seed: Tensor, count: Tensor | None = None) -> Tensor:
    """The matrices (B, N, N) that give every token the mean of those with the same seed (B, N) that count (B, N)."""
    same = (seed[:, :, None] == seed[:, None, :]).double()
    same = same if count is None else same * count[:, None, :]
    return same / same.sum(dim=2, keepdim=True).clamp(min=1)


def counting(args: tuple, kwargs: dict, h: Tensor) -> Tensor:
    """Ones for the tokens (B, N) that the mask of an MSA lets any token attend to, zeros for the others."""
    masks = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, Tensor)]
    masks = [mask for mask in masks if mask.ndim == 4 and mask.shape[-1] == h.shape[1]]
    count = torch.ones(h.shape[:2], dtype=h.dtype)
    for mask in masks:
        seen = mask if mask.dtype == torch.bool else mask > -1e30
        count = count * seen.sum(dim=(1, 2)).clamp(max=1)
    return count


def at_clusters(
    msa: nn.Module, args: tuple, kwargs: dict, seed: Tensor, prefix: int, ask: bool, count: Tensor
) -> Tensor:
    """Z where every patch gives way to the mean of its cluster and lies where the seed lies, by the host's own MSA.

    Where the patches ask, they follow as they are, each at its own place, as tokens that no token attends to, and their
    Z is what is given back.

    Args:
        msa: Of the host.
        args: Of its forward.
        kwargs: Of its forward.
        seed: (B, H·W), what `seeds` gives.
        prefix: Number of tokens before the patches.
        ask: Whether the patches ask, or their clusters.
        count: (B, N), zeros for padding, which no token attends to.
    """
    h = args[0] if args else kwargs["hidden_states"]
    named = zip(list(inspect.signature(msa.forward).parameters)[1:], args[1:], strict=False)
    others = {name: value for name, value in [*named, *kwargs.items()] if name != "hidden_states"}
    fused = getattr(getattr(msa, "config", None), "_attn_implementation", None) == "sdpa"
    if fused and getattr(msa, "is_causal", False) and others.get("attention_mask") is None:  # as SDPA takes it
        others["attention_mask"] = torch.ones(1, 1, h.shape[1], h.shape[1], dtype=torch.bool).tril()
    with ExitStack() as undo:
        for module in msa.modules():  # the host must not take this run's attention maps for the block's own
            undo.callback(setattr, module, "_forward_hooks", module._forward_hooks)
            module._forward_hooks = OrderedDict()
        return torch.cat(
            [
                _at_clusters_of_one(
                    msa, h[number : number + 1], number, len(h), h, others, seed[number], prefix, ask, count[number]
                )
                for number in range(len(h))
            ]
        )


def _at_clusters_of_one(
    msa: nn.Module,
    h: Tensor,
    number: int,
    batch: int,
    whole: Tensor,
    kwargs: dict,
    seed: Tensor,
    prefix: int,
    ask: bool,
    counts: Tensor,
) -> Tensor:
    """Of one image of a batch."""
    count, patches = h.shape[1], len(seed)
    unseen = torch.cat([counts == 0, torch.ones(patches if ask else 0, dtype=torch.bool)])
    own = torch.arange(prefix, prefix + patches)
    places = torch.arange(count)
    places[own] = prefix + seed
    lie = torch.cat([places, own]) if ask else places
    given: list[Tensor] = []  # masks and biases

    def moved(value):
        if isinstance(value, (tuple, list)):
            return tuple(map(moved, value))
        if not isinstance(value, Tensor):
            return value
        if value.ndim > 2 and value.shape[0] == batch:
            value = value[number : number + 1]
        if value.shape[-2:] == (count, count):
            value = value[..., lie, :][..., lie]
            value[..., unseen] = False if value.dtype == torch.bool else -torch.inf
            given.append(value)
            return value
        if value.shape[-2] == count:  # MLCD rotates every token
            return value[..., lie, :]
        return value[..., lie[prefix:] - prefix, :] if value.shape[-2] == patches else value

    with ExitStack() as undo:
        for owner, name in ((msa, "_get_rel_pos_bias"), (getattr(msa, "rel_pos", None), "get_bias")):
            if hasattr(owner, name) and getattr(owner, "relative_position_bias_table", owner) is not None:
                bias = moved(getattr(owner, name)())
                setattr(owner, name, lambda bias=bias: bias)
                undo.callback(delattr, owner, name)
        mean = averaging(places[None], counts[None])[0].to(h.dtype)
        tokens = torch.cat([mean @ h, h[:, own]], dim=1) if ask else mean @ h
        # torch's own MSA is given its input three times.
        kwargs = {name: tokens if value is whole else moved(value) for name, value in kwargs.items()}
        # V-JEPA 2 makes rotary embeddings inside, of the places that it is given.
        if "position_mask" in inspect.signature(msa.forward).parameters:
            kwargs["position_mask"] = lie[None]
        if ask and not given:
            undo.enter_context(
                _masked(h.new_zeros(len(lie), len(lie)).index_fill(1, torch.arange(count, len(lie)), -torch.inf))
            )
        if ask and hasattr(msa, "proj_w"):  # talking heads, whose bias gives weight to masked tokens as well
            keep = (torch.arange(len(lie)) < count)[:, None]
            undo.callback(msa.proj_w.register_forward_hook(lambda module, args, out: out * keep).remove)
        out = msa.forward(tokens, **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    return torch.cat([out[:, :prefix], out[:, count:], out[:, prefix + patches : count]], dim=1) if ask else out


@contextmanager
def _masked(mask: Tensor) -> Iterator[None]:
    """Adds to the scores of a host that is given no mask of its own."""
    name, sdpa, softmax = "scaled_dot_product_attention", F.scaled_dot_product_attention, Tensor.softmax

    def masked(query, key, value, attn_mask=None, *args, **kwargs):
        return sdpa(query, key, value, mask if attn_mask is None else mask + attn_mask, *args, **kwargs)

    def masked_softmax(scores, *args, **kwargs):
        # SAM 2 makes scores of heads with heads as well, and reads them nowhere.
        return softmax(scores + mask if scores.shape[-2:] == mask.shape[-2:] else scores, *args, **kwargs)

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # of torch's own MSA, which calls neither
    try:
        with mock.patch.object(F, name, masked), mock.patch.object(Tensor, "softmax", masked_softmax):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def phi_weights(cut_block: nn.Module) -> dict[str, Tensor]:
    """Copies of a Φ's weights, by name, that take gradients of their own."""
    named = {name.removeprefix("phi."): p for name, p in cut_block.named_parameters() if name.startswith("phi.")}
    return {name: weight.detach().clone().requires_grad_() for name, weight in named.items()}


def _skipped(msa: nn.Module, cut_block: nn.Module, h: Tensor, z: Tensor, prefix: int, grid: tuple[int, ...]) -> Tensor:
    """Z of a skipped block: Φ's, and where its MSA is kept in part, what that gives."""
    pool = cut_block.phi.pool
    seed, count = seeds(h[:, prefix:], grid, pool) if pool else None, torch.ones(h.shape[:2], dtype=h.dtype)
    made = phi(phi_weights(cut_block), z, prefix, grid, h, seed)
    if pool:
        coarse = at_clusters(msa, (h,), {}, seed, prefix, cut_block.phi.queries == "patches", count)
        made = torch.cat([made[:, :prefix], made[:, prefix:] + coarse[:, prefix:]], dim=1)
    if cut_block.phi.prefix == "attend":
        own = msa(h)
        own = own[0] if isinstance(own, tuple) else own
        made = torch.cat([own[:, :prefix], made[:, prefix:]], dim=1)
    return made


def vit_final_tokens(
    tower: nn.Module, cut_blocks: nn.ModuleList, images: Tensor, skip: set[int], prefix: int, patch: int
) -> Tensor:
    """The tokens after the last norm of a cut transformers ViT or DeiT, block by block."""
    grid = (images.shape[-2] // patch, images.shape[-1] // patch)
    x = tower.embeddings(images)
    z = None
    for index, block in enumerate(tower.layers):
        h = block.layernorm_before(x)
        skipped = index in skip
        z = _skipped(block.attention, cut_blocks[index], h, z, prefix, grid) if skipped else block.attention(h)[0]
        x = x + z
        x = x + block.mlp(block.layernorm_after(x))
    return tower.layernorm(x)


def timm_final_tokens(
    tower: nn.Module, cut_blocks: nn.Sequential, images: Tensor, skip: set[int], prefix: int, patch: int
) -> Tensor:
    """The tokens after the last norm of a cut timm VisionTransformer, block by block."""
    grid = (images.shape[-2] // patch, images.shape[-1] // patch)
    x = tower.norm_pre(tower._pos_embed(tower.patch_embed(images)))
    z = None
    for index, block in enumerate(tower.blocks):
        h = block.norm1(x)
        z = _skipped(block.attn, cut_blocks[index], h, z, prefix, grid) if index in skip else block.attn(h)
        x = x + block.ls1(z)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return tower.norm(x)


@contextmanager
def paper_equations(
    stock: nn.Module,
    msa: str,
    depth: int,
    weights: dict[int, dict[str, Tensor]],
    grid: tuple[int, ...] | list[tuple[int, ...]],
    prefix: int,
    suffix: int = 0,
    attends: Container[int] = (),
    pools: Mapping[int, int] = MappingProxyType({}),
    asking: Container[int] = (),
    merge: int = 0,
    window: int = 0,
    grids: Sequence[tuple[int, ...]] = (),
    folded: int = 0,
    units: Sequence[int] = (),
) -> Iterator[nn.Module]:
    """An untouched model of any family that computes the paper's equations while the context lasts.

    Hooks put Z_l = Φ_l(Z_{l-1}) in the place of what the MSA of a skipped block returns. The host does all the rest.

    Args:
        stock: The untouched model.
        msa: Path of the MSA of block i, with ``{}`` for i.
        depth: The number of blocks.
        weights: Φ's weights by skipped block.
        grid: The true patch grid of the images to come, or that of each of them.
        prefix: Number of tokens before the patches.
        suffix: Number of tokens after them, which Φ treats like those before.
        attends: The skipped blocks whose prefix and suffix tokens keep what the MSA gives them.
        pools: The sides p of the skipped blocks whose MSA still runs, over one cluster for p × p patches.
        asking: Those of them whose patches ask, rather than their clusters.
        merge: Where all images are packed into one sequence, the side of the blocks in which their patches are.
        window: Where these lie window by window, the side of a window in patches.
        grids: Where there are stages, the grid of what each block gives.
        folded: Where each window of an image is an image of its own, the number of them along a side. A global MSA is
            given those of an image in one row.
        units: Where tokens lie in units, how often the map of each block is parted.
    """
    z: dict[int, Tensor] = {}

    def hook_of(index: int):
        def hook(module, args, kwargs, output):
            is_tuple = isinstance(output, tuple)
            z[index] = made = output[0] if is_tuple else output
            block = stock.get_submodule(msa.format(index).rpartition(".")[0])
            if grids and (made.ndim == 3 or stages.in_blocks(block)):
                own = grids[index]
                places = in_units.places(own, units[index]) if units else stages.places(block, own, made)
                z[index] = stages.tokens(made, places, own)
                if index not in weights:
                    return None
                x, side = stages.tokens(args[0] if args else kwargs["hidden_states"], places, own), pools.get(index, 0)
                seed = seeds(x, own, side) if side else None
                z[index] = phi(weights[index], z[index - 1], 0, own, x, seed)
                if side:
                    z[index] += at_clusters(module, (x,), {}, seed, 0, index in asking, torch.ones(x.shape[:2]))
                made = stages.like(z[index], made, places)
                return (made, *output[1:]) if is_tuple else made
            if folded:
                in_window = tuple(length // folded for length in grid)
                tokens = prefix + in_window[0] * in_window[1]
                z[index] = made.reshape(-1, tokens, made.shape[2])
                if index not in weights:
                    return None
                x = (args[0] if args else kwargs["hidden_states"]).reshape(z[index].shape)
                after = phi(weights[index], z[index - 1], prefix, in_window, x)
                if index in attends:
                    after = torch.cat([z[index][:, :prefix], after[:, prefix:]], dim=1)
                z[index], made = after, after.reshape(made.shape)
                return (made, *output[1:]) if is_tuple else made
            lies = grids[index] if grids else grid
            if made.ndim == 4:
                z[index] = maps.tokens(made, lies)
            if index not in weights:
                return None
            before = z[index - 1]
            if made.ndim == 4:
                z[index] = on_map(
                    module, args, kwargs, before, weights[index], lies, pools.get(index, 0), index in asking
                )
                made = maps.like(z[index], made, lies)
                return (made, *output[1:]) if is_tuple else made
            if merge:
                how = grid, merge, pools, index, index in asking, window
                found = packed(module, args, kwargs, before, weights[index], *how)
                z[index] = found.view_as(z[index])
                return (z[index], *output[1:]) if is_tuple else z[index]
            end = before.shape[1] - suffix

            def patches_last(tokens):
                return torch.cat([tokens[:, :prefix], tokens[:, end:], tokens[:, prefix:end]], dim=1)

            h, special, side = args[0] if args else kwargs["hidden_states"], prefix + suffix, pools.get(index, 0)
            count = counting(args, kwargs, h)
            if isinstance(grid, list):
                after, seed, count = phi_of_each(weights[index], before, prefix, grid, h, side)
            else:
                own = count[:, prefix:end]
                seed = seeds(h[:, prefix:end], grid, side, own) if side else None
                after = phi(weights[index], patches_last(before), special, grid, patches_last(h), seed, own)
            if side:
                coarse = patches_last(at_clusters(module, args, kwargs, seed, prefix, index in asking, count))
                after = torch.cat([after[:, :special], after[:, special:] + coarse[:, special:]], dim=1)
            if index in attends:
                own = output[0] if is_tuple else output
                after = torch.cat([own[:, :prefix], own[:, end:], after[:, prefix + suffix :]], dim=1)
            z[index] = torch.cat(
                [after[:, :prefix], after[:, prefix + suffix :], after[:, prefix : prefix + suffix]], 1
            )
            return (z[index], *output[1:]) if is_tuple else z[index]

        return hook

    with ExitStack() as hooks:
        for index in range(depth):
            hooks.callback(
                stock.get_submodule(msa.format(index)).register_forward_hook(hook_of(index), with_kwargs=True).remove
            )
        yield stock
