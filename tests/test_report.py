"""`report`: its figures by value, its text and its notebook form."""

from __future__ import annotations

import copy

import torch

import skipat_surgery
from skipat_surgery import PhiConfig
from skipat_surgery.measure.report import describe


def test_figures_are_those_of_the_formulas(vit):
    before = sum(p.numel() for p in vit.vit.parameters())
    report = skipat_surgery.report(
        skipat_surgery.apply(
            vit, {2: PhiConfig(expansion=0.5, prefix="mix", pool=0, reads_x=False), 3: PhiConfig.paper()}
        )
    )
    tokens, patches, d, mlp = 17, 16, 32, 48
    attended = 4 * tokens * d * d + 2 * tokens * tokens * d + 2 * tokens * d * mlp
    # The Linear before GELU takes every token, the one after it the patches.
    mixed = (tokens + patches) * d * 16 + 9 * patches * 16 + 2 * d * d + 2 * tokens * d * mlp
    paper = (tokens + patches) * d * 64 + 25 * patches * 64 + 3 * d + 2 * tokens * d * mlp
    assert [b.macs_before for b in report.blocks] == [attended] * 6
    assert [b.macs_after for b in report.blocks] == [attended, attended, mixed, paper, attended, attended]
    assert report.macs_before - report.macs_after == 2 * attended - mixed - paper
    msa, norm = 4 * (d * d + d), 2 * d
    phi = 4 * d * d + 55 * d + 3  # the paper's, 25 weights and 1 bias a channel in the convolution
    assert report.blocks[3].parameters_before - report.blocks[3].parameters_after == msa + norm - phi
    assert report.parameters_before == before
    assert report.parameters_after == sum(p.numel() for p in vit.vit.parameters())
    assert [b.source for b in report.blocks] == [None, None, 1, 2, None, None]
    (tower,) = report.towers
    assert (tower.path, tower.num_prefix_tokens, tower.grid) == ("vit", 1, (4, 4))


def test_prefix_tokens_that_attend_are_counted(vit):
    report = skipat_surgery.report(skipat_surgery.apply(vit, [2], PhiConfig(expansion=0.5, pool=0, reads_x=False)))
    tokens, patches, heads, d, mlp = 17, 16, vit.config.num_attention_heads, 32, 48
    phi = (tokens + patches) * d * 16 + 9 * patches * 16
    absorbed = 2 * heads * tokens * d + 4 * d * d  # scores and what is read; q, k, v and o of one token
    assert report.blocks[2].macs_after == phi + absorbed + 2 * tokens * d * mlp
    kept = report.blocks[2].parameters_after - report.blocks[2].parameters_before
    assert kept == 2 * d * 16 + d + 16 + 10 * 16  # Φ comes, and neither the norm nor a projection goes


def test_the_msa_of_clusters_is_counted(vit):
    report = skipat_surgery.report(skipat_surgery.apply(vit, [2], PhiConfig(expansion=0.5, prefix="pass")))
    tokens, patches, clusters, d, mlp = 17, 16, 4, 32, 48
    phi = (tokens + tokens + clusters + patches) * d * 16 + 9 * patches * 16  # of Z, LN(X) and its clusters, and back
    msa = (2 * clusters + 2 * (clusters + 1)) * d * d + 2 * clusters * (clusters + 1) * d
    alike = tokens * clusters * d  # each token with each seed
    assert report.blocks[2].macs_after == phi + msa + alike + 2 * tokens * d * mlp


def test_patches_that_ask_are_counted(vit):
    (few, many) = (
        skipat_surgery.report(skipat_surgery.apply(copy.deepcopy(vit), [2], PhiConfig(queries=queries))).blocks[2]
        for queries in ("clusters", "patches")
    )
    patches, clusters, d = 16, 4, 32
    more = patches - clusters  # queries, each with its projection, its output and its row of the attention
    assert many.macs_after - few.macs_after == 2 * more * d * d + 2 * more * (clusters + 1) * d
    assert "MSA of patches among clusters, one for 2×2 patches" in describe(PhiConfig(queries="patches"))


def test_it_reads_well(vit):
    report = skipat_surgery.report(skipat_surgery.apply(vit, [2, 3]))
    text = str(report)
    assert text.startswith("SkipatViTForImageClassification")
    assert "ViT and DINO (transformers) in 'vit'" in text
    assert "MSA ⇒ Φ: expansion 0.25, 3×3, prefix attend" in text
    assert "block 1 (MSA)" in text
    assert "block 2 (Φ)" in text
    assert "2 of 6 blocks skipped" in text
    assert "1 prefix tokens, 4×4 patches" in text
    assert "<pre>" in report._repr_html_()


def test_it_leaves_the_model_alone(timm_vit):
    skipat_surgery.apply(timm_vit, [2]).train()
    before = copy.deepcopy(timm_vit.state_dict())
    skipat_surgery.report(timm_vit)
    assert all(module.training for module in timm_vit.modules())
    after = timm_vit.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
