"""Φ, the function that stands in for a skipped block's MSA (paper §3.2, Fig. 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .clusters import Clustered, Clusters
from .config import PhiConfig
from .depthwise import DepthwiseConv2d
from .in_place import may_overwrite

# A hidden unit shifted this far keeps a unit-scale input where GELU is nearly the identity: two GELUs are off by 3 % of
# the scale. A further shift is closer in float32, but bfloat16 rounds it more coarsely.
LINEAR_SHIFT = 4.0
# What a fresh Φ scales Z by before that shift, as the scale of Z is not known without data.
FRESH_SCALE = 0.25


class EfficientChannelAttention(nn.Conv1d):
    """ECA: each channel is gated by a convolution over its neighbours' token means (paper Eq. 8).

    The gate starts at ½ on every channel.
    """

    def __init__(self, kernel_size: int = 3) -> None:
        super().__init__(1, 1, kernel_size, padding=kernel_size // 2, bias=False)
        nn.init.zeros_(self.weight)

    def forward(self, patches: Tensor) -> Tensor:
        """The gate (B, 1, D) of patch tokens (B, H·W, D)."""
        return super().forward(patches.mean(dim=1, keepdim=True)).sigmoid()


class Phi(nn.Module):
    """Φ: Z_l from Z_{l-1} without attention (paper Eq. 5).

    On the patch tokens, laid out as their H×W grid: FC, GELU, depthwise convolution, GELU, FC, ECA. On the prefix
    tokens: what `PhiConfig.prefix` says; where they attend, their Z is given. There is neither a norm nor
    a residual inside Φ. With all that `PhiConfig` can add, for x = LN(X), C the means over clusters of alike
    patches and Cᵀ their copies,

        Z_l = ECA(W_2 GELU(DwC(GELU(W_1 z + W_x x + Cᵀ W_c C x + b_1))) + b_2) + Cᵀ MSA(C x)

    A fresh Φ reuses Z: to 1 % at the scale of most models where the hidden width is at least the model's, else on the
    random subspace that its width spans; with the MSA of clusters, it starts from that alone. Prefix tokens start by
    passing through.

    Args:
        dim: Width D of the model.
        num_prefix_tokens: Number P of tokens before the patches (CLS, distillation, registers).
        config: The shape of Φ.
        num_suffix_tokens: Number S of tokens after the patches (YOLOS' detection tokens), treated like prefix tokens.

    Example:
        >>> phi = Phi(dim=8, num_prefix_tokens=1, config=PhiConfig.paper())
        >>> phi(torch.randn(2, 1 + 3 * 5, 8), grid=(3, 5)).shape
        torch.Size([2, 16, 8])
    """

    def __init__(self, dim: int, num_prefix_tokens: int, config: PhiConfig, num_suffix_tokens: int = 0) -> None:
        super().__init__()
        self.num_prefix_tokens, self.num_suffix_tokens = num_prefix_tokens, num_suffix_tokens
        self.prefix = config.prefix
        hidden = max(1, round(dim * config.expansion))
        self.pool, self.queries, self.reads_x = config.pool, config.queries, config.reads_x
        self.expand = nn.Linear(dim, hidden)
        self.expand_x = nn.Linear(dim, hidden, bias=False) if config.reads_x else None
        self.expand_clusters = nn.Linear(dim, hidden, bias=False) if config.reads_x and config.pool else None
        self.depthwise = DepthwiseConv2d(hidden, config.kernel_size)
        self.reduce = nn.Linear(hidden, dim)
        self.eca = EfficientChannelAttention() if config.channel_attention else None
        mixes = config.prefix == "mix" and num_prefix_tokens + num_suffix_tokens > 0
        self.mix = nn.Linear(2 * dim, dim) if mixes else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from reusing Z, as closely as the width allows."""
        dim, hidden = self.reduce.weight.shape
        encode = torch.empty(hidden, dim, device=self.expand.weight.device, dtype=torch.float32)
        nn.init.orthogonal_(encode)  # float32, since there is no QR in half precision
        decode = encode.T * (0 if self.pool else 1 / FRESH_SCALE)
        others = encode.new_zeros(hidden, dim * (self.num_inputs - 1))
        self.set_patch_map(torch.cat([FRESH_SCALE * encode, others], dim=1), decode, torch.zeros_like(self.reduce.bias))
        if self.mix is not None:
            eye = torch.eye(dim, device=encode.device, dtype=encode.dtype)
            self.set_prefix_map(torch.cat([eye, torch.zeros_like(eye)], dim=1), torch.zeros_like(self.mix.bias))

    @torch.no_grad()
    def set_patch_map(self, encode: Tensor, decode: Tensor, bias: Tensor, shift: Tensor | None = None) -> None:
        """Write the affine map ``decode @ (encode @ inputs + shift) + bias`` of the patch tokens into Φ.

        Both GELUs are the identity on inputs well above zero, so the hidden units are shifted there by `LINEAR_SHIFT`
        and back. That holds while ``encode @ inputs + shift`` is about unit scale.

        Args:
            encode: (h, k·D) for the k inputs of `patch_inputs`, with h at most the hidden width; further hidden units
                start at zero output.
            decode: (D, h).
            bias: (D,).
            shift: (h,), zero when left out.
        """
        used = encode.shape[0]
        if used > self.expand.out_features:
            raise ValueError(f"Φ has {self.expand.out_features} hidden units, the map needs {used}")
        gate = 1.0 if self.eca is None else 0.5
        expands = filter(None, (self.expand, self.expand_x, self.expand_clusters))
        for expand, part in zip(expands, encode.chunk(self.num_inputs, dim=1), strict=True):
            expand.weight[:used] = part
        self.expand.bias[:used] = LINEAR_SHIFT if shift is None else LINEAR_SHIFT + shift
        self.depthwise.weight.zero_()
        middle = self.depthwise.kernel_size[0] // 2
        self.depthwise.weight[:, :, middle, middle] = 1.0
        self.depthwise.bias.zero_()  # type: ignore[union-attr]
        self.reduce.weight.zero_()
        self.reduce.weight[:, :used] = decode / gate
        self.reduce.bias.copy_((bias - LINEAR_SHIFT * decode.sum(dim=1)) / gate)
        if self.eca is not None:
            self.eca.weight.zero_()

    @torch.no_grad()
    def set_prefix_map(self, weight: Tensor, bias: Tensor) -> None:
        """Write the affine map of [own Z, mean patch Z] to the new prefix Z: weight (D, 2D), bias (D,)."""
        if self.mix is None:
            raise ValueError("this Φ passes its prefix tokens through; PhiConfig(prefix='mix') gives it a map")
        self.mix.weight.copy_(weight)
        self.mix.bias.copy_(bias)

    def forward(
        self,
        z: Tensor,
        grid: tuple[int, int],
        rows: Tensor | None = None,
        x: Tensor | None = None,
        clustered: Clustered | None = None,
    ) -> Tensor:
        """Z of this block from Z of the block before.

        Args:
            z: (B, P + H·W + S, D).
            grid: (H, W), the patch grid.
            rows: (B, P + S, D), Z of the prefix and suffix tokens, where they attend.
            x: (B, P + H·W + S, D), LN(X), where Φ reads it.
            clustered: The clusters of its patches, the means of LN(X) over them and their Z, where Φ has clusters.

        Raises:
            ValueError: The number of tokens does not fit the grid, or something that Φ reads is not given.
        """
        prefix, patches, suffix = self.num_prefix_tokens, grid[0] * grid[1], self.num_suffix_tokens
        if z.shape[1] != prefix + patches + suffix:
            others = f"{prefix} prefix" + (f" and {suffix} suffix" if suffix else "")
            raise ValueError(
                f"Φ was given {z.shape[1]} tokens, but {others} tokens and a {grid[0]}×{grid[1]} patch grid make "
                f"{prefix + patches + suffix}"
            )
        if rows is None and self.attends:
            raise ValueError("the prefix tokens of this Φ attend: it must be given their rows of the MSA")
        if (x is None and self.reads_x) or (clustered is None and self.pool):
            raise ValueError("this Φ reads more than Z: it must be given x, and where it has clusters, clustered")
        return self.map_tokens(z, grid, prefix, rows, x, clustered)

    @property
    def attends(self) -> bool:
        """Whether Z of the prefix and suffix tokens comes from the MSA of their block."""
        return self.prefix == "attend" and self.num_prefix_tokens + self.num_suffix_tokens > 0

    @property
    def keeps_msa(self) -> bool:
        """Whether a part of the block's own MSA runs: for its prefix and suffix tokens, or over clusters."""
        return self.attends or self.pool > 0

    @property
    def num_inputs(self) -> int:
        """How many inputs `patch_inputs` has."""
        return 1 + (self.expand_x is not None) + (self.expand_clusters is not None)

    def clusters(self, h: Tensor, grid: tuple[int, int]) -> Clusters:
        """The clusters of tokens (B, P + H·W + S, D)."""
        return Clusters.of(h, self.num_prefix_tokens, self.num_suffix_tokens, grid, self.pool)

    def patch_inputs(self, grid: tuple[int, int], z: Tensor, x: Tensor | None, clustered: Clustered | None) -> Tensor:
        """What the hidden units read of the patches, (B, H·W, k·D): Z, LN(X), and its means over clusters."""
        parts, patches = [z], slice(self.num_prefix_tokens, self.num_prefix_tokens + grid[0] * grid[1])
        if self.expand_x is not None:
            assert x is not None
            parts.append(x)
        parts = [part[:, patches] for part in parts]
        if self.expand_clusters is not None:
            assert clustered is not None
            parts.append(clustered.clusters.spread(clustered.x))
        return torch.cat(parts, dim=-1)

    def map_tokens(
        self,
        z: Tensor,
        grid: tuple[int, int],
        first: int,
        rows: Tensor | None = None,
        x: Tensor | None = None,
        clustered: Clustered | None = None,
    ) -> Tensor:
        """Φ of tokens (B, N, D) whose patches start at `first`; every other token counts as a prefix token.

        Their Z is `rows`, where given; else what `PhiConfig.prefix` says.

        The rows of the prefix tokens are made room for in whatever is narrower, the hidden units or the output, and no
        other tensor of all tokens is copied.
        """
        last = first + grid[0] * grid[1]
        others = z.shape[1] - (last - first)
        room = others > 0 and self.reduce.in_features < self.reduce.out_features
        out = self.checkpointed(self.convolve, self.hidden(z, grid, first, x, clustered), grid)
        out = self.checkpointed(self.project, out, (first, z.shape[1] - last) if room else (0, 0))
        if self.eca is not None:
            gate = self.eca(out[:, first:last] if room else out)
            out = out.mul_(gate) if may_overwrite(self) else out * gate
        if clustered is not None:
            (out[:, first:last] if room else out).add_(clustered.patches())
        if others == 0:
            return out
        prefix = rows
        if prefix is None:
            prefix = self.map_prefix(torch.cat([z[:, :first], z[:, last:]], dim=1), z[:, first:last])
        if not room:
            return torch.cat([prefix[:, :first], out, prefix[:, first:]], dim=1)
        out[:, :first] = prefix[:, :first]
        out[:, last:] = prefix[:, first:]
        return out

    def hidden(
        self, z: Tensor, grid: tuple[int, int], first: int, x: Tensor | None, clustered: Clustered | None
    ) -> Tensor:
        """The hidden units of the patches, (B, H·W, h), before the first GELU."""
        # All tokens go through the Linear, as a slice of Z would have to be copied, and Z may be wider than the hidden
        # units. Then the patches are copied out: GELU and the convolution are slow on a slice.
        hidden = self.expand(z)
        if self.expand_x is not None:
            hidden += self.expand_x(x)
        hidden = hidden[:, first : first + grid[0] * grid[1]].contiguous()
        if self.expand_clusters is not None:
            assert clustered is not None
            hidden += clustered.clusters.spread(self.expand_clusters(clustered.x))
        return hidden

    def checkpointed(self, step: Callable[..., Tensor], *args: Any) -> Tensor:
        """Do a step; in training, where Φ is wider than the model, make its GELU again in the backward.

        Four wide tensors are more than all that autograd keeps for the MSA. So it keeps the two before the GELUs.
        """
        wide = self.expand.out_features > self.expand.in_features
        if wide and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return checkpoint(step, *args, use_reentrant=False, preserve_rng_state=False)
        return step(*args)

    def convolve(self, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
        """GELU and depthwise convolution: (B, H·W, h) to (B, h, H, W)."""
        # (B, H·W, h) seen as (B, h, H, W) is channels-last in memory already: neither view copies.
        return self.depthwise(self.gelu(hidden).unflatten(1, grid).permute(0, 3, 1, 2))

    def project(self, hidden: Tensor, room: tuple[int, int]) -> Tensor:
        """GELU and FC: (B, h, H, W) to (B, H·W, D), with this many more tokens before and after."""
        hidden = self.gelu(hidden).permute(0, 2, 3, 1).flatten(1, 2)
        return self.reduce(F.pad(hidden, (0, 0, *room)) if any(room) else hidden)

    def gelu(self, hidden: Tensor) -> Tensor:
        """GELU, in place where nothing else needs what it is given."""
        return torch.ops.aten.gelu_(hidden) if may_overwrite(self) else F.gelu(hidden)

    def map_prefix(self, prefix: Tensor, patches: Tensor) -> Tensor:
        """(B, P, D) and (B, H·W, D) to (B, P, D)."""
        if self.mix is None:
            return prefix
        mean = patches.mean(dim=1, keepdim=True).expand_as(prefix)
        return self.mix(torch.cat([prefix, mean], dim=-1))
