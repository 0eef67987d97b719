"""Prefix tokens that attend: masks, dropout, adapters, keys that cannot be absorbed, and what is refused."""

from __future__ import annotations

import copy

import peft
import pytest
import timm
import torch
import transformers
from cases import case_named
from models import equations
from timm.layers import AttentionRope
from torch import nn
from torch.nn import functional as F
from transformers.models.internvl.modeling_internvl import InternVLVisionAttention

import skipat_surgery
from skipat_surgery import PhiConfig
from skipat_surgery.core import prefix_attention
from skipat_surgery.core.prefix_attention import attend
from skipat_surgery.core.projections import Special, repeated
from skipat_surgery.core.timm_projections import timm_projections
from skipat_surgery.core.transformers_projections import transformers_projections

EXACT = {"atol": 1e-10, "rtol": 1e-10}


def cut_of(model, **phi):
    return skipat_surgery.apply(copy.deepcopy(model), [2, 3], PhiConfig(prefix="attend", pool=0, reads_x=False, **phi))


def test_what_heads_share_is_repeated_and_what_they_do_not_is_no_copy():
    x = torch.arange(12.0).view(1, 2, 6)
    assert repeated(x, 1, 1) is x
    torch.testing.assert_close(repeated(x, 3, 1), x.repeat_interleave(3, dim=1), rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["additive", "boolean", "causal"])
@pytest.mark.parametrize("name", ["timm vit", "timm vit, registers", "timm eva02"])
def test_masks_are_honoured_in_timm(name, kind):
    case = case_named(name)
    stock, images = case.model(), case.images()
    count = case.prefix + 16
    mask = torch.randn(count, count, dtype=torch.float64)
    given = {"is_causal": True} if kind == "causal" else {"attn_mask": mask if kind == "additive" else mask > -1}
    cut = cut_of(stock)
    with equations(case, stock, cut, images):
        torch.testing.assert_close(cut(images, **given), stock(images, **given), **EXACT)
    assert not torch.allclose(cut(images, **given), cut(images))


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_masks_are_honoured_in_transformers(implementation, exact_softmax):
    case = case_named("ViTModel")
    stock, images = case.model(), case.images()
    stock.set_attn_implementation(implementation)
    mask = torch.ones(2, 17, dtype=torch.bool)
    mask[:, 5:9] = False
    cut = cut_of(stock)
    with equations(case, stock, cut, images):
        found, expected = (model(images, attention_mask=mask).last_hidden_state for model in (cut, stock))
    torch.testing.assert_close(found, expected, **EXACT)
    assert not torch.allclose(found, cut(images).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("absorbs", [True, False])
def test_dropout_acts_on_the_attention_weights(absorbs, monkeypatch, exact_softmax):
    """With a dropout that drops every third token, whoever asks."""
    case = case_named("ViTModel")
    stock, images = case.model(), case.images()
    stock.set_attn_implementation("eager")
    for module in stock.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5

    def third(x, p=0.5, training=True, inplace=False):
        kept = torch.arange(x.shape[-1]) % 3 > 0
        return x * kept / (1 - p) if training and p else x

    monkeypatch.setattr(F, "dropout", third)
    cut = cut_of(stock)
    if not absorbs:
        monkeypatch.setattr(prefix_attention, "_absorbed_read", prefix_attention._read)
    stock.train(), cut.train()
    with equations(case, stock, cut, images):
        torch.testing.assert_close(cut(images).last_hidden_state, stock(images).last_hidden_state, **EXACT)
    assert not torch.allclose(cut(images).last_hidden_state, cut.eval()(images).last_hidden_state)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("ViTModel", ["q_proj", "v_proj"]),
        ("ViTModel", ["k_proj"]),
        ("YolosModel", ["query", "value"]),
        ("timm vit", ["qkv"]),
    ],
)
def test_adapters_count(name, targets):
    """LoRA in the projections of a skipped block: trained, and the same as merged."""
    case = case_named(name)
    images = case.images()
    torch.manual_seed(0)
    model = peft.get_peft_model(cut_of(case.model()), peft.LoraConfig(target_modules=targets, r=4))
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            nn.init.normal_(parameter, std=0.3)
    inner = model.base_model.model
    found = case.tensors(inner, images)
    sum(out.square().mean() for out in found).backward()
    block = case.msa.format(3)
    grads = [p.grad for n, p in inner.named_parameters() if n.startswith(block) and "lora_" in n]
    assert len(grads) == 2 * len(targets)
    assert "k_proj" in targets or all(grad.abs().max() > 0 for grad in grads)
    plain = case.tensors(model.merge_and_unload(), images)
    for adapted, merged in zip(found, plain, strict=True):
        torch.testing.assert_close(adapted, merged, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"qkv_fused": False, "num_kv_heads": 2}, {"qk_norm": True}, {"scale_norm": True, "gated": True}],
    ids=str,
)
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("special", [Special(1, 0), Special(9, 0)])
def test_rows_equal_the_hosts(kwargs, rope, special):
    """Absorbed or made, as many heads as tokens or not."""
    torch.manual_seed(0)
    msa = AttentionRope(32, 4, num_prefix_tokens=special.prefix, norm_layer=nn.LayerNorm, **kwargs).double().eval()
    h = torch.randn(2, special.prefix + 12, 32, dtype=torch.float64)
    embedding = torch.randn(12, 16, dtype=torch.float64) if rope else None
    rows = attend(timm_projections(msa, h, rope=embedding), h, special, training=False)
    torch.testing.assert_close(rows, msa(h, rope=embedding)[:, : special.prefix], **EXACT)


@torch.no_grad()
def test_queries_and_keys_may_be_normed_over_all_heads_at_once():
    """As InternVL's, whose norm computes in float32: the same numbers go into both."""
    torch.manual_seed(0)
    config = transformers.InternVLVisionConfig(hidden_size=32, num_attention_heads=4, use_qk_norm=True)
    config._attn_implementation = "sdpa"
    msa = InternVLVisionAttention(config).double().eval()
    for norm in (msa.q_norm, msa.k_norm):
        nn.init.normal_(norm.weight)
    h = torch.randn(2, 13, 32, dtype=torch.float64)
    rows = attend(transformers_projections(msa, h), h, Special(1, 0), training=False)
    torch.testing.assert_close(rows, msa(h)[0][:, :1], **EXACT)


def test_what_cannot_be_taken_apart_is_refused():
    class Sparse(timm.layers.Attention):
        """Of one's own making: nobody knows what it computes."""

    model = timm.create_model("vit_tiny_patch16_224", depth=4, num_classes=0)
    model.blocks[2].attn.__class__ = Sparse
    with pytest.raises(
        ValueError, match=r"MSA of block 2 can be kept, as its .*Sparse .*PhiConfig\(prefix='mix', pool=0\)"
    ):
        skipat_surgery.apply(model, [2])
    assert not hasattr(model.blocks[2], "phi")
    skipat_surgery.apply(model, [2], PhiConfig(prefix="mix", pool=0))
