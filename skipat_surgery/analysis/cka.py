"""How alike the blocks of a model are: CKA between all of them (paper §3.1, Fig. 2 and 5).

Centred kernel alignment is averaged over minibatches with the unbiased HSIC₁, numerators and denominators apart
(Nguyen et al., 2010.15327, Eq. 2-3): one pass, and memory that does not grow with the number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from ..core.ragged import Ragged
from ..observing import evaluating, observe, pixels_of
from ..result import Result, titled_table
from ..tower import Tower

SMALLEST_BATCH = 4


@dataclass(frozen=True)
class Similarity(Result):
    """CKA between the blocks of a model, (L, L) in float64 on the CPU; 1 is the same up to rotation and scale.

    Args:
        msa: Of Z, the MSA output, or of what Φ put in its place.
        cls_attention: Of A^[CLS], how CLS attends to all tokens; NaN for skipped blocks, and None for a model without
            a prefix token.
        images: How many images were seen.
    """

    msa: Tensor
    cls_attention: Tensor | None
    images: int

    def table(self) -> Table:
        """How alike each block is to the one before it."""
        shown = titled_table(f"CKA between neighbours, {self.images:,} images", "blocks", "Z", "A^[CLS]")
        for block in range(1, len(self.msa)):
            cls = "–" if self.cls_attention is None else f"{float(self.cls_attention[block - 1, block]):.2f}"
            shown.add_row(f"{block - 1}, {block}", f"{float(self.msa[block - 1, block]):.2f}", cls)
        return shown

    def plot(self, path: str | Path, skip: Iterable[int] = ()) -> None:
        """Draw the pair of heatmaps of the paper's Fig. 2, with the numbers in their cells.

        Args:
            path: Where to, with any ending that matplotlib writes.
            skip: Blocks to mark on both axes.
        """
        from .pictures import heatmaps

        panels = {"Z$^{MSA}$": self.msa}
        if self.cls_attention is not None:
            panels = {"A$^{[CLS]}$": self.cls_attention, **panels}
        heatmaps(panels, f"CKA between blocks, {self.images:,} images", Path(path), set(skip))


def hsic1(grams: Tensor) -> Tensor:
    """The unbiased HSIC₁ of all pairs of Gram matrices: (L, n, n) to (L, L) (Song et al. 2012, Eq. 5).

    Raises:
        ValueError: n is below 4, where it is not defined.
    """
    count = grams.shape[-1]
    if count < SMALLEST_BATCH:
        raise ValueError(f"the unbiased HSIC needs batches of at least {SMALLEST_BATCH} images, got {count}")
    grams = grams - torch.diag_embed(grams.diagonal(dim1=1, dim2=2))
    rows = grams.sum(dim=2)
    totals = rows.sum(dim=1)
    joint = torch.einsum("inm,jnm->ij", grams, grams)
    constant = torch.outer(totals, totals) / ((count - 1) * (count - 2))
    return (joint + constant - 2 / (count - 2) * rows @ rows.T) / (count * (count - 3))


class MinibatchCKA:
    """CKA of all pairs among L features, from the Gram matrices of one minibatch after another."""

    def __init__(self) -> None:
        self.hsic: Tensor | float = 0.0

    def add(self, grams: Tensor) -> None:
        """Add one minibatch: (L, n, n)."""
        self.hsic = self.hsic + hsic1(grams)

    def add_each(self, layers: Iterable[Sequence[Tensor]]) -> None:
        """Add several minibatches: of each of L features, the Gram matrix of each minibatch."""
        for layer in zip(*layers, strict=True):
            self.add(torch.stack(layer))

    def value(self) -> Tensor:
        """(L, L), in float64."""
        assert isinstance(self.hsic, Tensor)
        scale = self.hsic.diagonal().sqrt()
        return self.hsic / torch.outer(scale, scale)


def gram(features: Tensor) -> Tensor:
    """The Gram matrix (n, n), in float64, of features (n, …), flattened and centred.

    HSIC₁ does not depend on the mean, but taking it off keeps the digits.
    """
    flat = features.flatten(1).double()
    flat = flat - flat.mean(dim=0)
    return flat @ flat.T


class ClsAttention(TorchFunctionMode):
    """Keeps A^[CLS] (B, heads, N) of each block while a model runs, fused attention or not.

    Fused attention never shows its weights; its query, key and mask do, and one row of them costs next to nothing.
    """

    def __init__(self) -> None:
        self.inside: int | None = None
        self.rows: dict[int, Tensor] = {}

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.inside is not None:
            if function is F.scaled_dot_product_attention:
                self._keep(cls_row(*args, **kwargs))
            elif function in (F.softmax, torch.softmax, Tensor.softmax):
                out = function(*args, **kwargs)
                if out.ndim == 4 and out.shape[2] == out.shape[3]:
                    self._keep(out[:, :, 0])
                return out
        return function(*args, **kwargs)

    def _keep(self, row: Tensor) -> None:
        assert self.inside is not None
        if self.inside in self.rows:
            raise ValueError(
                f"the MSA of block {self.inside} takes more than one softmax (differential attention), so there is no "
                "A^[CLS] to compare; pass cls_attention=False"
            )
        self.rows[self.inside] = row

    @contextmanager
    def watching(self, tower: Tower) -> Iterator[None]:
        """Watch the attended blocks of a tower."""
        handles = []
        for index in range(tower.reach):
            if index not in tower.skip:
                slot = tower.msa_slot(index)
                handles.append(slot.register_forward_pre_hook(lambda *_, index=index: setattr(self, "inside", index)))
                handles.append(slot.register_forward_hook(lambda *_: setattr(self, "inside", None)))
        try:
            with self:
                yield
        finally:
            self.inside = None
            for handle in handles:
                handle.remove()


def cls_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The first token's row (B, heads, N) of what `scaled_dot_product_attention`, with these arguments, hides."""
    if is_causal or enable_gqa:
        raise ValueError("A^[CLS] is read from plain attention only, not from causal or grouped-query attention")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * query[:, :, :1] @ key.transpose(-2, -1)
    if attn_mask is not None:
        first = attn_mask[..., :1, :]
        scores = scores.masked_fill(~first, float("-inf")) if first.dtype == torch.bool else scores + first
    return scores.softmax(dim=-1)[:, :, 0]


def cka(model: nn.Module, batches: Iterable[Any], *, cls_attention: bool = True, progress: bool = True) -> Similarity:
    """CKA between all blocks of a model, cut or not, in one pass (paper §3.1).

    Features are flattened per image, Z over tokens and channels, A^[CLS] over heads and tokens, and images are the
    samples. Where images have a grid each, those of one grid are a minibatch; where fewer than 4 of a batch have one,
    they are left out.

    Args:
        model: A vision transformer of a supported family.
        batches: Batches of images (B, C, H, W) or videos (B, T, C, H, W), ``(images, labels)`` pairs, or mappings with
            ``pixel_values``, of at least 4 images; 64 and more are better. A smaller last batch is left out.
        cls_attention: Whether to compare A^[CLS] as well, where there is a prefix token.
        progress: Whether to show a bar.

    Raises:
        ValueError: There was no batch of 4 images, or the model's attention shows no A^[CLS].

    Examples:
        >>> import timm
        >>> import torch
        >>> import skipat_surgery
        >>> small = dict(img_size=32, patch_size=8, embed_dim=32, depth=6, num_heads=2, num_classes=4)
        >>> model = timm.create_model("vit_tiny_patch16_224", **small).eval()
        >>> batches = torch.randn(64, 3, 32, 32).split(16)
        >>> similarity = skipat_surgery.cka(model, batches, progress=False)
        >>> similarity.msa.shape
        torch.Size([6, 6])
        >>> similarity.plot("cka.png")
    """
    tower = Tower.of(model)
    blocks = range(tower.reach)  # those after see further tokens
    attended = [index for index in blocks if index not in tower.skip]
    watch = cls_attention and tower.family.num_prefix_tokens(tower.module) > 0
    msa, cls, images = MinibatchCKA(), MinibatchCKA(), 0
    device = next(tower.module.parameters()).device
    with evaluating(model):
        for batch in tqdm(batches, desc="CKA", unit="batch", disable=not progress):
            pixels = pixels_of(batch).to(device)
            grid = tower.ragged(pixels)
            groups = groups_of(grid, len(pixels), tower.num_special_tokens)
            if not groups:
                continue
            rows = ClsAttention()
            layout = partial(tower.layout_in, layout=tower.layout(pixels))
            with observe(tower, blocks, keep=partial(grams, groups=groups), grid=layout) as seen:
                if watch:
                    with rows.watching(tower):
                        tower.run(pixels)
                else:
                    tower.run(pixels)
            msa.add_each(seen.z[index] for index in blocks)
            if watch:
                check_rows(rows.rows, attended)
                cls.add_each(grams(rows.rows[index].mT, groups) for index in attended)
            images += sum(len(group.images) for group in groups)
    if images == 0:
        raise ValueError(
            f"batches gave no batch of at least {SMALLEST_BATCH} images of one size, which CKA needs, as it compares "
            "images token by token: give images of one size, or larger batches"
        )
    attention = among_all_blocks(cls.value().cpu(), attended, len(blocks)) if watch else None
    return Similarity(msa.value().cpu(), attention, images)


@dataclass(frozen=True)
class Group:
    """Images of a batch that have the same tokens.

    Args:
        images: (n,), which they are.
        tokens: How many tokens each has.
    """

    images: Tensor
    tokens: int | None


def groups_of(grid: Ragged | None, images: int, num_special_tokens: int) -> list[Group]:
    """The images of a batch by their grid, each grid that enough of them have: CKA compares images token by token.

    Args:
        grid: That of each image, or None where all have the same.
        images: How many there are.
        num_special_tokens: How many tokens, before the patches, are none.
    """
    if grid is None:
        return [Group(torch.arange(images), None)] if images >= SMALLEST_BATCH else []
    sizes, which = grid.sizes.unique(dim=0, return_inverse=True)
    found = [
        Group((which == number).nonzero().flatten(), num_special_tokens + rows * columns)
        for number, (rows, columns) in enumerate(sizes.tolist())
    ]
    return [group for group in found if len(group.images) >= SMALLEST_BATCH]


def grams(features: Tensor, groups: Iterable[Group]) -> list[Tensor]:
    """The Gram matrix of each group, of features (B, N, …) that have whatever behind the tokens of an image."""
    return [gram(features[group.images.to(features.device), : group.tokens]) for group in groups]


def check_rows(rows: dict[int, Tensor], attended: list[int]) -> None:
    """Check that every attended block showed its A^[CLS].

    Raises:
        ValueError: One did not; with what to do.
    """
    missing = [index for index in attended if index not in rows]
    if missing:
        raise ValueError(
            f"blocks {missing} showed no A^[CLS]: their attention calls neither torch's scaled_dot_product_attention "
            "nor softmax. Load the model with attn_implementation='sdpa' or 'eager', or pass cls_attention=False"
        )


def among_all_blocks(values: Tensor, attended: list[int], depth: int) -> Tensor:
    """The matrix of the attended blocks among all blocks; NaN elsewhere."""
    full = torch.full((depth, depth), float("nan"), dtype=values.dtype)
    full[torch.tensor(attended)[:, None], torch.tensor(attended)] = values
    return full
