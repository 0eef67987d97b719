"""The paper's equations, written plainly in float64 and sharing no code with the library.

The cut model's blocks are walked in a loop. Everything but the surgery (embeddings, MSA, norms, MLP, head) is taken
from an untouched copy of the host model; Φ's weights are taken from the cut one by name.
"""

from __future__ import annotations

import math

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
    if "eca.conv.weight" in weights:
        left, middle, right = weights["eca.conv.weight"].flatten()
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
    return {
        name.removeprefix("phi."): p.detach() for name, p in cut_block.named_parameters() if name.startswith("phi.")
    }


def hf_final_tokens(
    tower: nn.Module,
    cut_blocks: nn.ModuleList,
    images: Tensor,
    skip: set[int],
    prefix: int,
    patch: int,
    **kwargs: bool,
) -> Tensor:
    """The tokens after the last norm of a cut transformers ViT or DeiT."""
    grid = (images.shape[-2] // patch, images.shape[-1] // patch)
    x = tower.embeddings(images, **kwargs)
    z = None
    for index, block in enumerate(tower.layers):
        if index in skip:
            z = phi(phi_weights(cut_blocks[index]), z, prefix, grid)
        else:
            z = block.attention(block.layernorm_before(x))[0]
        x = x + z
        x = x + block.mlp(block.layernorm_after(x))
    return tower.layernorm(x)


def timm_final_tokens(
    tower: nn.Module, cut_blocks: nn.Sequential, images: Tensor, skip: set[int], prefix: int, patch: int
) -> Tensor:
    """The tokens after the last norm of a cut timm VisionTransformer."""
    grid = (images.shape[-2] // patch, images.shape[-1] // patch)
    x = tower.norm_pre(tower._pos_embed(tower.patch_embed(images)))
    z = None
    for index, block in enumerate(tower.blocks):
        if index in skip:
            z = phi(phi_weights(cut_blocks[index]), z, prefix, grid)
        else:
            z = block.attn(block.norm1(x))
        x = x + block.ls1(z)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return tower.norm(x)
