"""Checkpoints in the layout of the paper's release, against a plain forward written from the authors' description."""

from __future__ import annotations

import argparse
import math
import os

import pytest
import reference
import timm
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageClassification

import skipat_surgery

WIDTH, DEPTH, HEADS, CLASSES = 192, 12, 3, 10


def random_weights() -> dict[str, Tensor]:
    """Random weights under the names of timm 0.5.4's ``vit_tiny`` with the authors' six Φ; 64×64 images."""
    torch.manual_seed(0)

    def linear(name: str, out: int, into: int) -> dict[str, Tensor]:
        return {f"{name}.weight": torch.randn(out, into) / math.sqrt(into), f"{name}.bias": 0.1 * torch.randn(out)}

    def norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + 0.1 * torch.randn(WIDTH), f"{name}.bias": 0.1 * torch.randn(WIDTH)}

    found = {
        "cls_token": torch.randn(1, 1, WIDTH),
        "pos_embed": torch.randn(1, 17, WIDTH),
        "patch_embed.proj.weight": 0.05 * torch.randn(WIDTH, 3, 16, 16),
        "patch_embed.proj.bias": torch.randn(WIDTH),
        **norm("norm"),
        **linear("head", CLASSES, WIDTH),
    }
    for index in range(DEPTH):
        block = f"blocks.{index}"
        found |= norm(f"{block}.norm1") | norm(f"{block}.norm2")
        found |= linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH) | linear(f"{block}.attn.proj", WIDTH, WIDTH)
        found |= linear(f"{block}.mlp.fc1", 4 * WIDTH, WIDTH) | linear(f"{block}.mlp.fc2", WIDTH, 4 * WIDTH)
    for index in range(1, 7):
        phi = f"param_{index}"
        found |= linear(f"{phi}.linear1.0", 2 * WIDTH, WIDTH) | linear(f"{phi}.linear2.0", WIDTH, 2 * WIDTH)
        found |= {f"{phi}.dwconv.0.weight": 0.2 * torch.randn(2 * WIDTH, 1, 5, 5)}
        found |= {f"{phi}.dwconv.0.bias": 0.1 * torch.randn(2 * WIDTH), f"{phi}.eca.conv.weight": torch.randn(1, 1, 3)}
    return found


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights()


def authors_forward(w: dict[str, Tensor], images: Tensor) -> Tensor:
    """Logits: the class token's MSA output is kept from the last attended block, the patches' goes through each Φ."""
    w = {name: value.double() for name, value in w.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    def msa(name: str, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = linear(f"{name}.qkv", x).reshape(batch, tokens, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        scores = (qkv[0] @ qkv[1].transpose(-1, -2) / math.sqrt(WIDTH // HEADS)).softmax(dim=-1)
        return linear(f"{name}.proj", (scores @ qkv[2]).transpose(1, 2).reshape(batch, tokens, WIDTH))

    x = F.conv2d(images.double(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=16)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], dim=1) + w["pos_embed"]
    z = torch.empty(0)
    for index in range(DEPTH):
        if 3 <= index <= 8:
            theirs = {"linear1.0": "expand", "dwconv.0": "depthwise", "linear2.0": "reduce", "eca.conv": "eca"}
            prefix = f"param_{index - 2}."
            named = {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}
            phi = {f"{theirs[n.rpartition('.')[0]]}.{n.rpartition('.')[2]}": value for n, value in named.items()}
            z = reference.phi(phi, z, 1, (4, 4))
        else:
            z = msa(f"blocks.{index}.attn", norm(f"blocks.{index}.norm1", x))
        x = x + z
        hidden = reference.gelu(linear(f"blocks.{index}.mlp.fc1", norm(f"blocks.{index}.norm2", x)))
        x = x + linear(f"blocks.{index}.mlp.fc2", hidden)
    return linear("head", norm("norm", x)[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("wrapped", ["model", "state_dict_ema", "state_dict"])
@pytest.mark.parametrize("host", ["timm", "transformers"])
def test_output_equals_the_authors_forward(weights, host, wrapped, tmp_path):
    stored = {f"module.{name}": value for name, value in weights.items()} if wrapped == "state_dict" else weights
    torch.save({wrapped: stored, "args": argparse.Namespace(lr=1e-3), "epoch": 300}, tmp_path / "skipat.t7")
    model = skipat_surgery.load_authors(tmp_path / "skipat.t7", host)
    images = torch.randn(2, 3, 64, 64)
    expected = authors_forward(weights, images)
    found = model.double()(images.double())
    torch.testing.assert_close(getattr(found, "logits", found), expected, atol=1e-9, rtol=1e-9)
    found = model.float()(images)
    torch.testing.assert_close(
        getattr(found, "logits", found).double(), expected, atol=1e-5 * expected.abs().max(), rtol=0
    )


@torch.no_grad()
@pytest.mark.parametrize("host", ["timm", "transformers"])
def test_it_is_saved_as_a_standard_checkpoint(weights, host, tmp_path):
    torch.save({"model": weights}, tmp_path / "skipat.t7")
    model = skipat_surgery.load_authors(tmp_path / "skipat.t7", host)
    model.save_pretrained(tmp_path / "standard")
    images = torch.randn(2, 3, 64, 64)
    if host == "timm":
        loaded = timm.create_model(f"local-dir:{tmp_path / 'standard'}", pretrained=True).eval()
        assert torch.equal(loaded(images), model(images))
    else:
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "standard")
        assert torch.equal(loaded(images).logits, model(images).logits)


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch /tmp/skipat-was-here",)


def test_a_pickle_that_runs_code_is_refused(weights, tmp_path):
    torch.save({"model": weights, "extra": RunsCode()}, tmp_path / "evil.t7")
    with pytest.raises(ValueError, match="holds more than weights and is refused"):
        skipat_surgery.load_authors(tmp_path / "evil.t7")
    assert not os.path.exists("/tmp/skipat-was-here")


def test_another_file_is_refused(weights, tmp_path):
    torch.save({"model": {"fc.weight": torch.ones(1)}}, tmp_path / "other.t7")
    with pytest.raises(ValueError, match=r"no checkpoint of the SkipAT release: it lacks .*patch_embed"):
        skipat_surgery.load_authors(tmp_path / "other.t7")
    with pytest.raises(ValueError, match="host must be 'timm' or 'transformers', got 'keras'"):
        skipat_surgery.load_authors(tmp_path / "other.t7", host="keras")
