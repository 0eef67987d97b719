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
from .depthwise import depthwise
from .in_place import may_overwrite, may_write
from .padding import mean_of, without_padding
from .ragged import Layout, Ragged, places_in, seen_in
from .recording import is_recorded
from .tokens import by

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

    def forward(self, patches: Tensor, attended: Tensor | None = None) -> Tensor:
        """The gate (B, 1, D) of patch tokens (B, H·W, D), of which only those that are attended to (B, H·W) count."""
        return super().forward(mean_of(patches, attended)).sigmoid()


class Phi(nn.Module):
    """Φ: Z_l from Z_{l-1} without attention (paper Eq. 5).

    On the patch tokens, laid out as their H×W grid (of a video T×H×W): FC, GELU, depthwise convolution, GELU, FC, ECA.
    On the prefix tokens: what `PhiConfig.prefix` says; where they attend, their Z is given. There is neither a norm nor
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
        axes: Of the patch grid: 2, or 3 of a video.

    Examples:
        >>> phi = Phi(dim=8, num_prefix_tokens=1, config=PhiConfig.paper())
        >>> phi(torch.randn(2, 1 + 3 * 5, 8), grid=(3, 5)).shape
        torch.Size([2, 16, 8])
    """

    def __init__(
        self, dim: int, num_prefix_tokens: int, config: PhiConfig, num_suffix_tokens: int = 0, axes: int = 2
    ) -> None:
        super().__init__()
        self.num_prefix_tokens, self.num_suffix_tokens = num_prefix_tokens, num_suffix_tokens
        self.prefix = config.prefix
        hidden = max(1, round(dim * config.expansion))
        self.pool, self.queries, self.reads_x = config.pool, config.queries, config.reads_x
        self.expand = nn.Linear(dim, hidden)
        self.expand_x = nn.Linear(dim, hidden, bias=False) if config.reads_x else None
        self.expand_clusters = nn.Linear(dim, hidden, bias=False) if config.reads_x and config.pool else None
        self.depthwise = depthwise(hidden, config.kernel(axes))
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
        middle: tuple[Any, ...] = (..., *(side // 2 for side in self.depthwise.kernel_size))
        self.depthwise.weight[middle] = 1.0
        self.depthwise.bias.zero_()
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
        grid: Layout,
        rows: Tensor | None = None,
        x: Tensor | None = None,
        clustered: Clustered | None = None,
        attended: Tensor | None = None,
    ) -> Tensor:
        """Z of this block from Z of the block before.

        Args:
            z: (B, P + H·W + S, D).
            grid: (H, W) or (T, H, W), the patch grid; or the grids of the images, where they differ.
            rows: (B, P + S, D), Z of the prefix and suffix tokens, where they attend.
            x: (B, P + H·W + S, D), LN(X), where Φ reads it.
            clustered: The clusters of its patches, the means of LN(X) over them and their Z, where Φ has clusters.
            attended: (B or 1, P + H·W + S), which tokens are no padding; all where it is left out.

        Raises:
            ValueError: The number of tokens does not fit the grid, or something that Φ reads is not given.
        """
        self.check_tokens(z, grid)
        if rows is None and self.attends:
            raise ValueError("the prefix tokens of this Φ attend: it must be given their rows of the MSA")
        if (x is None and self.reads_x) or (clustered is None and self.pool):
            raise ValueError("this Φ reads more than Z: it must be given x, and where it has clusters, clustered")
        return self.map_tokens(z, grid, self.num_prefix_tokens, rows, x, clustered, attended)

    def check_tokens(self, z: Tensor, grid: Layout) -> None:
        """Check the number of tokens (B, N, D) against the grid.

        Raises:
            ValueError: It does not fit.
        """
        prefix, patches, suffix = self.num_prefix_tokens, places_in(grid), self.num_suffix_tokens
        if z.shape[1] != prefix + patches + suffix:
            others = f"{prefix} prefix" + (f" and {suffix} suffix" if suffix else "")
            where = f"places for {patches} patches" if isinstance(grid, Ragged) else f"a {by(grid)} patch grid"
            raise ValueError(
                f"Φ was given {z.shape[1]} tokens, but {others} tokens and {where} make {prefix + patches + suffix}"
            )

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

    def clusters(self, h: Tensor, grid: Layout, attended: Tensor | None = None) -> Clusters:
        """The clusters of tokens (B, P + H·W + S, D).

        Raises:
            ValueError: The number of tokens does not fit the grid.
        """
        self.check_tokens(h, grid)
        prefix, suffix = self.num_prefix_tokens, self.num_suffix_tokens
        return Clusters.of(h, prefix, suffix, grid, self.pool, seen_in(grid, attended, prefix, suffix))

    def patch_inputs(self, grid: Layout, z: Tensor, x: Tensor | None, clustered: Clustered | None) -> Tensor:
        """What the hidden units read of the patches, (B, H·W, k·D): Z, LN(X), and its means over clusters."""
        parts, patches = [z], slice(self.num_prefix_tokens, self.num_prefix_tokens + places_in(grid))
        if self.expand_x is not None:
            assert x is not None
            parts.append(x)
        parts = [part[:, patches] for part in parts]
        if self.expand_clusters is not None:
            assert clustered is not None
            parts.append(clustered.spread(clustered.x))
        return torch.cat(parts, dim=-1)

    def map_tokens(
        self,
        z: Tensor,
        grid: Layout,
        first: int,
        rows: Tensor | None = None,
        x: Tensor | None = None,
        clustered: Clustered | None = None,
        attended: Tensor | None = None,
    ) -> Tensor:
        """Φ of tokens (B, N, D) whose patches start at `first`; every other token counts as a prefix token.

        Their Z is `rows`, where given; else what `PhiConfig.prefix` says.

        Where writing is allowed, the rows of the prefix tokens are made room for in whatever is narrower, the hidden
        units or the output, and no other tensor of all tokens is copied.
        """
        last = first + places_in(grid)
        others = z.shape[1] - (last - first)
        attended = seen_in(grid, None if attended is None else attended[:, first:last])
        writes = may_write(self)
        room = writes and others > 0 and self.reduce.in_features < self.reduce.out_features
        out = self.checkpointed(self.convolve, self.hidden(z, grid, first, x, clustered, writes), grid, attended)
        out = self.checkpointed(self.project, out, (first, z.shape[1] - last) if room else (0, 0))
        if self.eca is not None:
            gate = self.eca(out[:, first:last] if room else out, attended)
            out = out.mul_(gate) if may_overwrite(self) else out * gate
        if clustered is not None and room:
            out[:, first:last].add_(clustered.patches())
        elif clustered is not None:
            out = _add(out, clustered.patches(), writes)
        if others == 0:
            return out
        prefix = rows
        if prefix is None:
            prefix = self.map_prefix(torch.cat([z[:, :first], z[:, last:]], dim=1), z[:, first:last], attended)
        if not room:
            return torch.cat([prefix[:, :first], out, prefix[:, first:]], dim=1)
        out[:, :first] = prefix[:, :first]
        out[:, last:] = prefix[:, first:]
        return out

    def hidden(
        self,
        z: Tensor,
        grid: Layout,
        first: int,
        x: Tensor | None,
        clustered: Clustered | None,
        writes: bool,
    ) -> Tensor:
        """The hidden units of the patches, (B, H·W, h), before the first GELU."""
        # All tokens go through the Linear, as a slice of Z would have to be copied, and Z may be wider than the hidden
        # units. Then the patches are copied out: GELU and the convolution are slow on a slice.
        hidden = self.expand(z)
        if self.expand_x is not None:
            hidden = _add(hidden, self.expand_x(x), writes)
        hidden = hidden[:, first : first + places_in(grid)].contiguous()
        if self.expand_clusters is not None:
            assert clustered is not None
            hidden = _add(hidden, clustered.spread(self.expand_clusters(clustered.x)), writes)
        return hidden

    def checkpointed(self, step: Callable[..., Tensor], *args: Any) -> Tensor:
        """Do a step; in training, where Φ is wider than the model, make its GELU again in the backward.

        Four wide tensors are more than all that autograd keeps for the MSA. So it keeps the two before the GELUs.
        """
        wide = self.expand.out_features > self.expand.in_features
        if wide and torch.is_grad_enabled() and not is_recorded():
            return checkpoint(step, *args, use_reentrant=False, preserve_rng_state=False)
        return step(*args)

    def convolve(self, hidden: Tensor, grid: Layout, attended: Tensor | None) -> Tensor:
        """GELU and depthwise convolution: (B, H·W, h) to (B, h, H, W), or of a video (B, h, T, H, W).

        Where grids differ by image, (B, N, h) to (B, h, N).
        """
        hidden = without_padding(self.gelu(hidden), attended)
        if isinstance(grid, Ragged):
            return self.depthwise(hidden, grid)
        # (B, H·W, h) seen so is channels-last in memory already: neither view copies.
        return self.depthwise(hidden.unflatten(1, grid).movedim(-1, 1))

    def project(self, hidden: Tensor, room: tuple[int, int]) -> Tensor:
        """GELU and FC: what `convolve` gives to (B, H·W, D), with this many more tokens before and after."""
        hidden = self.gelu(hidden).movedim(1, -1).flatten(1, -2)
        return self.reduce(F.pad(hidden, (0, 0, *room)) if any(room) else hidden)

    def gelu(self, hidden: Tensor) -> Tensor:
        """GELU, in place where nothing else needs what it is given."""
        return torch.ops.aten.gelu_(hidden) if may_overwrite(self) else F.gelu(hidden)

    def map_prefix(self, prefix: Tensor, patches: Tensor, attended: Tensor | None) -> Tensor:
        """(B, P, D) and (B, H·W, D) to (B, P, D)."""
        if self.mix is None:
            return prefix
        mean = mean_of(patches, attended).expand_as(prefix)
        return self.mix(torch.cat([prefix, mean], dim=-1))


def _add(to: Tensor, other: Tensor, writes: bool) -> Tensor:
    return to.add_(other) if writes else to + other
