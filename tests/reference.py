"""The paper's equations, written plainly in float64 and sharing no code with the library.

Everything but the surgery (embeddings, MSA, norms, MLP, head) is taken from an untouched copy of the host model; Φ's
weights are taken from the cut one by name. `paper_equations` does this on any family through hooks, and the two loops,
which walk the blocks of a ViT in the open, check it.
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def phi(
    weights: dict[str, Tensor],
    z: Tensor,
    prefix: int,
    grid: tuple[int, int],
    x: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """Φ (paper Eq. 5-8): FC, GELU, depthwise convolution, GELU, FC, ECA on the patches; the prefix as configured.

    The FC may read LN(X), and its mean over the patches with the same seed, beside Z.
    """
    height, width = grid
    patches = z[:, prefix:]
    hidden = torch.einsum("bnd,hd->bnh", patches, weights["expand.weight"]) + weights["expand.bias"]
    if "expand_x.weight" in weights:
        hidden = hidden + torch.einsum("bnd,hd->bnh", x[:, prefix:], weights["expand_x.weight"])
    if "expand_clusters.weight" in weights:
        means = torch.einsum("bmn,bnd->bmd", averaging(seed).to(x.dtype), x[:, prefix:])
        hidden = hidden + torch.einsum("bnd,hd->bnh", means, weights["expand_clusters.weight"])
    hidden = gelu(hidden)
    kernel, bias = weights["depthwise.weight"], weights["depthwise.bias"]
    side = kernel.shape[-1]
    image = hidden.reshape(z.shape[0], height, width, -1)
    padded = torch.nn.functional.pad(image, (0, 0, side // 2, side // 2, side // 2, side // 2))
    convolved = bias + sum(
        padded[:, i : i + height, j : j + width] * kernel[:, 0, i, j] for i in range(side) for j in range(side)
    )
    hidden = gelu(convolved).reshape(z.shape[0], height * width, -1)
    out = torch.einsum("bnh,dh->bnd", hidden, weights["reduce.weight"]) + weights["reduce.bias"]
    if "eca.weight" in weights:
        left, middle, right = weights["eca.weight"].flatten()
        mean = out.mean(dim=1)
        padded = torch.nn.functional.pad(mean, (1, 1))
        gate = left * padded[:, :-2] + middle * padded[:, 1:-1] + right * padded[:, 2:]
        out = out / (1 + torch.exp(-gate))[:, None, :]
    first = z[:, :prefix]
    if "mix.weight" in weights and prefix:
        mean = patches.mean(dim=1, keepdim=True).repeat(1, prefix, 1)
        both = torch.cat([first, mean], dim=2)
        first = torch.einsum("bnd,ed->bne", both, weights["mix.weight"]) + weights["mix.bias"]
    return torch.cat([first, out], dim=1)


def seeds(x: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """For patches (B, H·W, D), which patch is the seed of each (B, H·W): of the first of every side × side, the one
    with the greatest cosine; a seed is its own."""
    places = [row * grid[1] + column for row in range(0, grid[0], side) for column in range(0, grid[1], side)]
    length = x.square().sum(dim=2).sqrt()
    cosines = torch.einsum("bnd,bmd->bnm", x, x[:, places]) / (length[:, :, None] * length[:, None, places])
    found = torch.tensor(places)[cosines.argmax(dim=2)]
    found[:, places] = torch.tensor(places)
    return found


def averaging(seed: Tensor) -> Tensor:
    """The matrices (B, N, N) that give every token the mean of those with the same seed (B, N)."""
    same = (seed[:, :, None] == seed[:, None, :]).double()
    return same / same.sum(dim=2, keepdim=True)


def at_clusters(msa: nn.Module, args: tuple, kwargs: dict, seed: Tensor, prefix: int, ask: bool) -> Tensor:
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
    """
    h = args[0] if args else kwargs["hidden_states"]
    others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    with ExitStack() as undo:
        for module in msa.modules():  # the host must not take this run's attention maps for the block's own
            undo.callback(setattr, module, "_forward_hooks", module._forward_hooks)
            module._forward_hooks = OrderedDict()
        return torch.cat(
            [
                _at_clusters_of_one(
                    msa, h[number : number + 1], number, len(h), args[1:], others, seed[number], prefix, ask
                )
                for number in range(len(h))
            ]
        )


def _at_clusters_of_one(
    msa: nn.Module,
    h: Tensor,
    number: int,
    batch: int,
    args: tuple,
    kwargs: dict,
    seed: Tensor,
    prefix: int,
    ask: bool,
) -> Tensor:
    """Of one image of a batch."""
    count, patches = h.shape[1], len(seed)
    own = torch.arange(prefix, prefix + patches)
    places = torch.arange(count)
    places[own] = prefix + seed
    lie = torch.cat([places, own]) if ask else places
    given: list[Tensor] = []  # masks and biases

    def moved(value):
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        if not isinstance(value, Tensor):
            return value
        if value.ndim == 4 and value.shape[0] == batch:
            value = value[number : number + 1]
        if value.shape[-2:] == (count, count):
            value = value[..., lie, :][..., lie]
            value[..., count:] = False if value.dtype == torch.bool else -torch.inf
            given.append(value)
            return value
        return value[..., lie[prefix:] - prefix, :] if value.shape[-2] == patches else value

    with ExitStack() as undo:
        for owner, name in ((msa, "_get_rel_pos_bias"), (getattr(msa, "rel_pos", None), "get_bias")):
            if hasattr(owner, name) and getattr(owner, "relative_position_bias_table", owner) is not None:
                bias = moved(getattr(owner, name)())
                setattr(owner, name, lambda bias=bias: bias)
                undo.callback(delattr, owner, name)
        mean = averaging(places[None])[0].to(h.dtype)
        names = list(inspect.signature(msa.forward).parameters)
        kwargs = {name: moved(value) for name, value in [*zip(names[1:], args, strict=False), *kwargs.items()]}
        tokens = torch.cat([mean @ h, h[:, own]], dim=1) if ask else mean @ h
        if ask and not given:
            undo.enter_context(
                _masked(h.new_zeros(len(lie), len(lie)).index_fill(1, torch.arange(count, len(lie)), -torch.inf))
            )
        out = msa.forward(tokens, **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    return torch.cat([out[:, :prefix], out[:, count:], out[:, prefix + patches : count]], dim=1) if ask else out


@contextmanager
def _masked(mask: Tensor) -> Iterator[None]:
    """Adds to the scores of a host that is given no mask of its own."""
    name, sdpa = "scaled_dot_product_attention", F.scaled_dot_product_attention

    def masked(query, key, value, attn_mask=None, *args, **kwargs):
        return sdpa(query, key, value, mask if attn_mask is None else mask + attn_mask, *args, **kwargs)

    with mock.patch.object(F, name, masked):
        yield


def phi_weights(cut_block: nn.Module) -> dict[str, Tensor]:
    """Copies of a Φ's weights, by name, that take gradients of their own."""
    named = {name.removeprefix("phi."): p for name, p in cut_block.named_parameters() if name.startswith("phi.")}
    return {name: weight.detach().clone().requires_grad_() for name, weight in named.items()}


def _skipped(msa: nn.Module, cut_block: nn.Module, h: Tensor, z: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """Z of a skipped block: Φ's, and where its MSA is kept in part, what that gives."""
    pool = cut_block.phi.pool
    seed = seeds(h[:, prefix:], grid, pool) if pool else None
    made = phi(phi_weights(cut_block), z, prefix, grid, h, seed)
    if pool:
        coarse = at_clusters(msa, (h,), {}, seed, prefix, cut_block.phi.queries == "patches")
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
    grid: tuple[int, int],
    prefix: int,
    suffix: int = 0,
    attends: Container[int] = (),
    pools: Mapping[int, int] = MappingProxyType({}),
    asking: Container[int] = (),
) -> Iterator[nn.Module]:
    """An untouched model of any family that computes the paper's equations while the context lasts.

    Hooks put Z_l = Φ_l(Z_{l-1}) in the place of what the MSA of a skipped block returns. The host does all the rest.

    Args:
        stock: The untouched model.
        msa: Path of the MSA of block i, with ``{}`` for i.
        depth: The number of blocks.
        weights: Φ's weights by skipped block.
        grid: The true patch grid of the images to come.
        prefix: Number of tokens before the patches.
        suffix: Number of tokens after them, which Φ treats like those before.
        attends: The skipped blocks whose prefix and suffix tokens keep what the MSA gives them.
        pools: The sides p of the skipped blocks whose MSA still runs, over one cluster for p × p patches.
        asking: Those of them whose patches ask, rather than their clusters.
    """
    z: dict[int, Tensor] = {}

    def hook_of(index: int):
        def hook(module, args, kwargs, output):
            is_tuple = isinstance(output, tuple)
            z[index] = output[0] if is_tuple else output
            if index not in weights:
                return None
            before = z[index - 1]
            end = before.shape[1] - suffix

            def patches_last(tokens):
                return torch.cat([tokens[:, :prefix], tokens[:, end:], tokens[:, prefix:end]], dim=1)

            h, special, side = args[0] if args else kwargs["hidden_states"], prefix + suffix, pools.get(index, 0)
            seed = seeds(h[:, prefix:end], grid, side) if side else None
            after = phi(weights[index], patches_last(before), special, grid, patches_last(h), seed)
            if side:
                coarse = patches_last(at_clusters(module, args, kwargs, seed, prefix, index in asking))
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
