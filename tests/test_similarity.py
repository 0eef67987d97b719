"""CKA against a plain, full-batch, debiased computation in numpy, and A^[CLS] against attention written out."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from cases import case_named
from figures import colours, saved_figures

import skipat_surgery
from skipat_surgery.observing import z_of
from skipat_surgery.tower import Tower


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.randn(24, 3, 32, 32, dtype=torch.float64)


def debiased_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear CKA of (n, p) and (n, q) with the unbiased HSIC, one sum at a time (Song et al. 2012, Eq. 5)."""

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        n = len(a)
        pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
        trace = sum(a[i, j] * b[j, i] for i, j in pairs)
        total = sum(a[i, j] for i, j in pairs) * sum(b[i, j] for i, j in pairs)
        rows = sum(
            sum(a[i, j] for j in range(n) if j != i) * sum(b[i, j] for j in range(n) if j != i) for i in range(n)
        )
        return (trace + total / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows) / (n * (n - 3))

    gram_x, gram_y = x @ x.T, y @ y.T
    return hsic(gram_x, gram_y) / np.sqrt(hsic(gram_x, gram_x) * hsic(gram_y, gram_y))


def rows_of_eager_attention(model, images):
    """A^[CLS] (B, heads, N) of each block, as transformers' eager attention returns it."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        return [maps[:, :, 0] for maps in eager(images, output_attentions=True).attentions]


def test_one_batch_equals_the_full_batch_debiased_value(vit, images):
    found = skipat_surgery.cka(vit, [images])
    with torch.no_grad():
        z = z_of(Tower.of(vit), range(6), images)
    rows = rows_of_eager_attention(vit, images)
    for i, j in [(0, 0), (0, 1), (2, 5), (4, 3)]:
        expected = debiased_cka(*(z[b].flatten(1).numpy() for b in (i, j)))
        assert float(found.msa[i, j]) == pytest.approx(expected, abs=1e-9)
        expected = debiased_cka(*(rows[b].flatten(1).numpy() for b in (i, j)))
        assert float(found.cls_attention[i, j]) == pytest.approx(expected, abs=1e-6)  # eager softmax is float32
    assert found.images == 24


def test_minibatches_average_numerators_and_denominators_apart(vit):
    torch.manual_seed(1)
    images = torch.randn(600, 3, 32, 32, dtype=torch.float64)
    whole = skipat_surgery.cka(vit, [images])
    parts = skipat_surgery.cka(vit, images.split(20))
    torch.testing.assert_close(parts.msa, whole.msa, atol=0.05, rtol=0)
    torch.testing.assert_close(parts.cls_attention, whole.cls_attention, atol=0.05, rtol=0)
    # The biased estimator, on batches of 20, lies far from it: this is what debiasing is for.
    with torch.no_grad():
        z = z_of(Tower.of(vit), [0, 5], images[:20])
    a, b = (
        (lambda k: k - k.mean(0) - k.mean(1, keepdim=True) + k.mean())(v.flatten(1) @ v.flatten(1).T)
        for v in z.values()
    )
    biased = float((a * b).sum() / (a.norm() * b.norm()))
    assert abs(biased - float(whole.msa[0, 5])) > 0.05


@pytest.mark.parametrize("name", ["timm vit", "timm eva02", "BeitForImageClassification", "DINOv3ViTModel"])
def test_fused_and_unfused_attention_show_the_same_rows(name):
    case = case_named(name)
    model = case.model()
    images = case.images()
    fused = skipat_surgery.cka(model, [torch.cat([images, images.flip(-1), images.flip(-2)])])
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    if isinstance(model, transformers.PreTrainedModel):
        model.set_attn_implementation("eager")
    plain = skipat_surgery.cka(model, [torch.cat([images, images.flip(-1), images.flip(-2)])])
    # transformers takes the softmax of eager attention in float32
    torch.testing.assert_close(fused.cls_attention, plain.cls_attention, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(fused.msa, plain.msa)


def test_a_cut_model_has_z_everywhere_and_no_attention_where_it_was_cut(vit, images):
    skipat_surgery.apply(vit, [2, 3])
    found = skipat_surgery.cka(vit, [images])
    assert not found.msa.isnan().any()
    skipped = torch.zeros(6, dtype=torch.bool)
    skipped[2:4] = True
    assert torch.equal(found.cls_attention.isnan(), skipped[:, None] | skipped)


def test_a_model_without_prefix_tokens_has_no_cls_attention(images):
    case = case_named("SiglipVisionModel")
    model = case.model()
    assert skipat_surgery.cka(model, [images]).cls_attention is None


def test_bad_input(vit, images):
    with pytest.raises(ValueError, match="no batch of at least 4 images"):
        skipat_surgery.cka(vit, images.split(3))
    model = case_named("timm vit, differential attention").model()
    with pytest.raises(ValueError, match="more than one softmax"):
        skipat_surgery.cka(model, [images])
    assert skipat_surgery.cka(model, [images], cls_attention=False).cls_attention is None


def test_the_picture(vit, images, tmp_path):
    similarity = skipat_surgery.cka(vit, [images])
    with saved_figures() as figures:
        similarity.plot(tmp_path / "cka.png", skip=[2])
    cls, msa = figures[0].axes[:2]
    for axis, values in ((cls, similarity.cls_attention), (msa, similarity.msa)):
        assert axis.collections[0].get_array().tolist() == values.tolist()
        marked = [label.get_text() for label in axis.get_xticklabels() if label.get_weight() == "bold"]
        assert marked == ["2"]
    assert colours(tmp_path / "cka.png") > 20
