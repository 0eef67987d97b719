"""A family that a user registers: cut, checked and saved as a built-in one."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from cases import Case
from models import assert_same, cut_of, equations, gradients, phi_weights
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import skipat_surgery
from skipat_surgery import Family, PhiConfig, Projection, Projections
from skipat_surgery.core import finding


class OwnBlock(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(32), attention
        self.mlp = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(x)


class OwnEmbeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls, self.patches = nn.Parameter(torch.randn(1, 1, 32)), nn.Conv2d(3, 32, 8, 8)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        return torch.cat([self.cls.expand(len(images), -1, -1), patches], dim=1)


class SingleHead(nn.Module):
    """An attention that is not torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor, key: Tensor, value: Tensor, need_weights: bool = True) -> tuple[Tensor, None]:
        scores = self.query(x) @ self.key(key).mT / 32**0.5
        return scores.softmax(dim=-1) @ self.value(value), None


class OwnViT(nn.Module):
    def __init__(self, attention: Any = lambda: nn.MultiheadAttention(32, 4, batch_first=True)) -> None:
        super().__init__()
        self.embeddings, self.checkpoints = OwnEmbeddings(), False
        self.blocks = nn.ModuleList(OwnBlock(attention()) for _ in range(6))

    def forward(self, images: Tensor) -> Tensor:
        x = self.embeddings(images)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoints else block(x)
        return x[:, 0]


FAMILY = Family(
    name="OwnViT",
    towers=(f"{__name__}.OwnViT",),
    block=f"{__name__}.OwnBlock",
    blocks="blocks",
    norm="norm",
    attention="attention",
    returns_tuple=True,
    embeddings="embeddings",
    final_norm=None,
    width=lambda tower: 32,
    num_prefix_tokens=lambda tower: 1,
    image_to_grid=lambda embeddings, height, width: (height // 8, width // 8),
    image_size=lambda tower: (3, 32, 32),
)
CASE = Case("own", "OwnViT (one's own)", OwnViT, "blocks.{}.attention", prefix=1)
SIZES = [(32, 32), (16, 48)]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "REGISTERED", [])
    skipat_surgery.register(FAMILY)


@pytest.mark.parametrize("phi", [PhiConfig(), PhiConfig.paper(), PhiConfig(queries="patches")], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_it_computes_the_papers_equations(phi: PhiConfig, size: tuple[int, int]) -> None:
    stock, images = CASE.model(), CASE.images(size)
    cut = cut_of(stock, [2, 3, 5], phi)
    found = CASE.tensors(cut, images)
    with equations(CASE, stock, cut, images):
        assert_same(found, CASE.tensors(stock, images), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_its_gradients_are_those_of_the_equations(checkpoints: bool) -> None:
    stock, images = CASE.model(), CASE.images()
    cut = cut_of(stock)
    cut.checkpoints = checkpoints
    found = gradients(CASE, cut, images)
    weights = phi_weights(CASE, cut)
    with equations(CASE, stock, cut, images, weights):
        gradients(CASE, stock, images)
    expected = {f"blocks.{i}.phi.{name}": w.grad for i, named in weights.items() for name, w in named.items()}
    assert_same({name: found[name] for name in expected}, expected, atol=1e-10, rtol=1e-8)


def test_it_is_restored_saved_copied_and_pickled(tmp_path) -> None:
    stock, images = CASE.model(), CASE.images()
    cut = cut_of(stock)
    expected = CASE.tensors(cut, images)
    skipat_surgery.save(cut, tmp_path)
    for twin in (
        skipat_surgery.load(tmp_path, copy.deepcopy(stock)),
        copy.deepcopy(cut),
        pickle.loads(pickle.dumps(cut)),
    ):
        assert_same(CASE.tensors(twin, images), expected, atol=0, rtol=0)
    assert_same(CASE.tensors(skipat_surgery.restore(cut), images), CASE.tensors(stock, images), atol=0, rtol=0)


def test_a_checkpoint_of_a_family_that_is_not_registered_is_refused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = CASE.model()
    skipat_surgery.save(cut_of(stock), tmp_path)
    monkeypatch.setattr(finding, "REGISTERED", [])
    with pytest.raises(ValueError, match=r"has a tower of the family OwnViT at \(root\), where this OwnViT has none"):
        skipat_surgery.load(tmp_path, stock)


def test_the_report_and_the_list_of_supported_families_name_it() -> None:
    assert skipat_surgery.report(cut_of(CASE.model())).towers[0].family == "OwnViT"
    with pytest.raises(skipat_surgery.UnsupportedModelError, match="your own OwnViT"):
        skipat_surgery.apply(nn.Linear(4, 4), [1])


@pytest.mark.parametrize(
    ("differs", "match"),
    [
        ({}, "a family named 'OwnViT' already"),
        ({"name": "CaiT (timm)"}, r"a family named 'CaiT \(timm\)' already"),
        ({"name": "another"}, "'OwnViT' is a family of the same towers and blocks"),
    ],
)
def test_registering_what_is_there_already_is_an_error(differs: dict[str, str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        skipat_surgery.register(dataclasses.replace(FAMILY, **differs))
    assert finding.REGISTERED == [FAMILY]


def test_only_families_are_registered() -> None:
    with pytest.raises(TypeError, match=r"takes a skipat_surgery.Family, got str"):
        skipat_surgery.register("OwnViT")  # type: ignore[arg-type]


@torch.no_grad()
def test_an_attention_that_is_not_torchs_is_kept_in_part_only_where_its_projections_are_given() -> None:
    own = Case("own", "OwnViT (one's own)", lambda: OwnViT(SingleHead), CASE.msa, prefix=1)
    with pytest.raises(ValueError, match=r"no part of the MSA of block 2 can be kept.*PhiConfig.paper\(\)"):
        skipat_surgery.apply(own.model(), [2])

    def projections(attention: Any, x: Tensor, *args: Any, **kwargs: Any) -> Projections:
        three = map(Projection.of, (attention.query, attention.key, attention.value))
        counts = {"num_heads": 1, "num_key_heads": 1, "num_value_heads": 1}
        parts = dict(zip(("query", "key", "value"), three, strict=True))
        return Projections(**counts, scale=32**-0.5, **parts, output=lambda context, asking: context, dropout=0.0)

    finding.REGISTERED[:] = [dataclasses.replace(FAMILY, projections=projections, attends=lambda attention: True)]
    stock, images = own.model(), own.images()
    cut = cut_of(stock, [2, 3])
    found = own.tensors(cut, images)
    with equations(own, stock, cut, images):
        assert_same(found, own.tensors(stock, images), atol=1e-10, rtol=1e-10)
