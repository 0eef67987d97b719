"""Padding: what a mask leaves out has no part in anything that Φ makes of the rest."""

from __future__ import annotations

import pytest
import torch
from cases import case_named
from models import KINDS_OF_PHI, cut_of
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from skipat_surgery.core.padding import attended_tokens

EXACT = {"atol": 1e-10, "rtol": 1e-10}
every_phi = pytest.mark.parametrize("phi", KINDS_OF_PHI.values(), ids=KINDS_OF_PHI.keys())
REAL = [(4, 3), (2, 4), (3, 1)]  # rows and columns of patches of each image, on a grid of 4×4


def masks() -> Tensor:
    """(B, 4, 4), where each image is."""
    mask = torch.zeros(len(REAL), 4, 4, dtype=torch.bool)
    for index, (rows, columns) in enumerate(REAL):
        mask[index, :rows, :columns] = True
    return mask


def with_other_padding(images: Tensor, mask: Tensor, side: int = 8) -> Tensor:
    kept = mask.repeat_interleave(side, dim=1).repeat_interleave(side, dim=2)[:, None]
    return torch.where(kept, images, 100 * torch.randn_like(images))


@torch.no_grad()
@every_phi
@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("Idefics3VisionTransformer, padded", "sdpa"),
        ("Idefics3VisionTransformer, padded", "eager"),
        ("SmolVLMVisionTransformer", "sdpa"),
        ("Phi4MultimodalVisionModel, padded", "eager"),  # its fused attention is causal where there is no mask
    ],
)
def test_an_image_comes_out_of_a_padded_batch_as_it_does_alone(name, implementation, phi, exact_softmax):
    """Each image, cut out of the batch and given without any padding, is the reference."""
    case = case_named(name)
    cut = cut_of(case.model(), [2, 3, 5], phi)
    cut.set_attn_implementation(implementation)
    images, mask = case.images(batch=len(REAL)), masks()
    found = cut(images, patch_attention_mask=mask).last_hidden_state.unflatten(1, (4, 4))
    for index, (rows, columns) in enumerate(REAL):
        alone = cut(images[index : index + 1, :, : 8 * rows, : 8 * columns]).last_hidden_state
        torch.testing.assert_close(found[index, :rows, :columns].flatten(0, 1), alone[0], **EXACT)


@torch.no_grad()
@every_phi
@pytest.mark.parametrize("name", ["Idefics3VisionTransformer, padded", "Phi4MultimodalVisionModel, padded"])
def test_the_padding_may_hold_anything(name, phi):
    case = case_named(name)
    cut = cut_of(case.model(), [2, 3, 5], phi)
    images, mask = case.images(batch=len(REAL)), masks()
    tokens = [
        cut(given, patch_attention_mask=mask).last_hidden_state for given in (images, with_other_padding(images, mask))
    ]
    real = mask.flatten(1)
    torch.testing.assert_close(tokens[0][real], tokens[1][real], **EXACT)
    assert not torch.allclose(tokens[0][~real], tokens[1][~real])


@torch.no_grad()
@every_phi
@pytest.mark.parametrize(
    ("name", "implementation"), [("ViTModel", "sdpa"), ("DeiTModel", "eager"), ("BeitModel", "eager")]
)
def test_what_a_user_masks_may_hold_anything(name, implementation, phi, exact_softmax):
    """Of models with prefix tokens, which stay."""
    case = case_named(name)
    cut = cut_of(case.model(), [2, 3, 5], phi)
    cut.set_attn_implementation(implementation)
    images, mask = case.images(batch=len(REAL)), masks()
    real = torch.cat([torch.ones(len(REAL), case.prefix, dtype=torch.bool), mask.flatten(1)], dim=1)
    tokens = [cut(given, attention_mask=real).last_hidden_state for given in (images, with_other_padding(images, mask))]
    torch.testing.assert_close(tokens[0][real], tokens[1][real], **EXACT)
    assert not torch.allclose(tokens[0], cut(images).last_hidden_state)


@torch.no_grad()
@every_phi
def test_a_whole_image_is_none_the_worse_for_a_mask(phi):
    case = case_named("Idefics3VisionTransformer, padded")
    cut = cut_of(case.model(), [2, 3, 5], phi)
    images, whole = case.images(), torch.ones(2, 4, 4, dtype=torch.bool)
    cut.set_attn_implementation("eager")  # which masks even where nothing is to be masked
    torch.testing.assert_close(cut(images, patch_attention_mask=whole)[0], cut(images)[0], **EXACT)


@torch.no_grad()
def test_an_image_of_nothing_but_padding_is_no_trouble_to_the_others():
    case = case_named("Idefics3VisionTransformer, padded")
    cut = cut_of(case.model(), [2, 3, 5])
    images, mask = case.images(), torch.ones(2, 4, 4, dtype=torch.bool)
    mask[1] = False
    try:
        stock = case.model()(images, patch_attention_mask=mask).last_hidden_state
    except Exception as error:
        pytest.skip(f"the stock model fails too: {error}")
    found = cut(images, patch_attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[:1], cut(images[:1]).last_hidden_state, **EXACT)
    assert found.isfinite().all() == stock.isfinite().all()


def test_every_kind_of_mask_says_the_same():
    real = torch.tensor([[True, True, False, True], [True, False, False, True]])
    rows = real[:, None, None].expand(2, 1, 4, 4)
    added = torch.zeros(2, 1, 4, 4).masked_fill(~rows, torch.finfo(torch.float32).min)
    blocks = create_block_mask(lambda b, h, q, k: real[b, k], 2, None, 4, 4, device="cpu")
    for mask in (real, real.long(), rows, added, added.half(), added + torch.randn(1, 3, 4, 4), blocks):
        assert torch.equal(attended_tokens((), {"attention_mask": mask}), real)
        assert torch.equal(attended_tokens((torch.empty(2, 4, 8), mask), {}), real)
    assert torch.equal(attended_tokens((), {"attn_mask": rows[0, 0]}), real[:1])
    assert attended_tokens((torch.empty(2, 4, 8),), {"attention_mask": None}) is None


def test_a_causal_mask_hides_no_token_from_all():
    causal = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    assert attended_tokens((), {"attention_mask": causal}).all()
