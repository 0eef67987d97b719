"""The paper's equations, written plainly in float64 and sharing no code with the library.

Everything but the surgery (embeddings, MSA, norms, MLP, head) is taken from an untouched copy of the host model; Φ's
weights are taken from the cut one by name. `paper_equations` does this on any family through hooks, and the two loops,
which walk the blocks of a ViT in the open, check it.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def phi(weights: dict[str, Tensor], z: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """Φ (paper Eq. 5-8): FC, GELU, depthwise convolution, GELU, FC, ECA on the patches; the prefix as configured."""
    height, width = grid
    patches = z[:, prefix:]
    hidden = gelu(torch.einsum("bnd,hd->bnh", patches, weights["expand.weight"]) + weights["expand.bias"])
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


def phi_weights(cut_block: nn.Module) -> dict[str, Tensor]:
    """Copies of a Φ's weights, by name, that take gradients of their own."""
    named = {name.removeprefix("phi."): p for name, p in cut_block.named_parameters() if name.startswith("phi.")}
    return {name: weight.detach().clone().requires_grad_() for name, weight in named.items()}


def _either(cut_block: nn.Module, own: Tensor, z: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """Z of a skipped block: Φ's, but for prefix tokens that attend, which have what the MSA gives them."""
    made = phi(phi_weights(cut_block), z, prefix, grid)
    return torch.cat([own[:, :prefix], made[:, prefix:]], dim=1) if cut_block.phi.prefix == "attend" else made


def vit_final_tokens(
    tower: nn.Module, cut_blocks: nn.ModuleList, images: Tensor, skip: set[int], prefix: int, patch: int
) -> Tensor:
    """The tokens after the last norm of a cut transformers ViT or DeiT, block by block."""
    grid = (images.shape[-2] // patch, images.shape[-1] // patch)
    x = tower.embeddings(images)
    z = None
    for index, block in enumerate(tower.layers):
        own = block.attention(block.layernorm_before(x))[0]
        z = _either(cut_blocks[index], own, z, prefix, grid) if index in skip else own
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
        own = block.attn(block.norm1(x))
        z = _either(cut_blocks[index], own, z, prefix, grid) if index in skip else own
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
    """
    z: dict[int, Tensor] = {}

    def hook_of(index: int):
        def hook(module, args, output):
            is_tuple = isinstance(output, tuple)
            z[index] = output[0] if is_tuple else output
            if index not in weights:
                return None
            before = z[index - 1]
            end = before.shape[1] - suffix
            first = torch.cat([before[:, :prefix], before[:, end:], before[:, prefix:end]], dim=1)
            after = phi(weights[index], first, prefix + suffix, grid)
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
            hooks.callback(stock.get_submodule(msa.format(index)).register_forward_hook(hook_of(index)).remove)
        yield stock
