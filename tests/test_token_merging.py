"""Token merging of the benchmarks, against plain loops and where it must change nothing."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import skipat_surgery
from skipat_surgery import PhiConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from skipat_surgery.measure import token_merging
from skipat_surgery.measure.token_merging import Matching, check_merging, merge_tokens


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 5, "num_heads": 4, "num_classes": 7}
    return timm.create_model("vit_tiny_patch16_224", **shape).eval().double()


def merged_plainly(keys: Tensor, x: Tensor, sizes: list[float], r: int, special: int) -> tuple[Tensor, list[float]]:
    """Of one image: keys (M, d), tokens (M, D)."""
    count, found = len(x), []
    for i in range(0, count, 2):
        options = [j for j in range(1, count, 2) if i >= special and j >= special]
        cosines = {j: torch.cosine_similarity(keys[i], keys[j], dim=0).item() for j in options}
        if cosines:
            found.append((max(cosines.values()), i, max(cosines, key=cosines.__getitem__)))
    weights, values = list(sizes), [x[i] * sizes[i] for i in range(count)]
    gone = set()
    for _, i, j in sorted(found, reverse=True)[:r]:
        values[j], weights[j] = values[j] + values[i], weights[j] + weights[i]
        gone.add(i)
    left = [i for i in range(0, count, 2) if i not in gone] + list(range(1, count, 2))
    order = [*range(special), *(i for i in left if i >= special)]
    return torch.stack([values[i] / weights[i] for i in order]), [weights[i] for i in order]


def rotary() -> nn.Module:
    """With four registers beside CLS, and positions that do not depend on the size of an image."""
    torch.manual_seed(0)
    model = timm.models.eva.Eva(
        img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_reg_tokens=4, num_classes=0,
        use_rot_pos_emb=True, use_abs_pos_emb=False, global_pool="", ref_feat_shape=None,
    )  # fmt: skip
    return model.eval().double()


def test_rotary_blocks_merge_nothing_to_the_model_itself():
    model = rotary()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(merge_tokens(model, 0)(images), model(images), atol=1e-10, rtol=0)
    check_merging(model, images.float())


def test_a_merged_token_lies_where_the_one_that_it_went_into_lay():
    """After a merge, the next block attends among what is left, each with the angle of its place."""
    model, seen = rotary(), []
    merging = merge_tokens(model, [3, 2, 0, 0])
    second, third = merging.blocks[1], merging.blocks[2]
    third.register_forward_pre_hook(lambda module, args: seen.append((args[0], second.shared.tokens)))
    second.register_forward_pre_hook(lambda module, args: seen.append((args[0], copy.copy(second.shared.tokens))))
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        merging(images)
        (x, tokens), (_, after) = seen
        assert tokens.positions.shape == (1, 21 - 3)
        assert after.positions.shape == (1, 21 - 5)
        assert tokens.positions[0, :5].tolist() == after.positions[0, :5].tolist() == [0, 1, 2, 3, 4]
        assert len(set(after.positions[0].tolist())) == 16
        rope = model.rope.get_embed((4, 4))[tokens.positions[0, 5:] - 5]
        block = model.blocks[1]
        mask = tokens.sizes.log()[:, None, None].expand(1, 1, 18, 18)
        expected = block.attn(block.norm1(x), rope=rope, attn_mask=mask)
        found = module_z(second, x, tokens, model.rope.get_embed((4, 4)))
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def module_z(block: nn.Module, x: Tensor, tokens: object, rope: Tensor) -> Tensor:
    """Z of a merging block on tokens that are given."""
    h = block.norm.forward(x)
    msa = block.projections(block.msa, h, **block._rotary(rope, tokens))
    return token_merging._attention(token_merging._weighted(msa, tokens.sizes), h)[0]


@pytest.mark.parametrize("special", [0, 1, 2, 5])
def test_a_matching_merges_the_most_alike(special):
    torch.manual_seed(0)
    keys, x = torch.randn(3, 17, 4, dtype=torch.float64), torch.randn(3, 17, 6, dtype=torch.float64)
    sizes = torch.randint(1, 5, (3, 17, 1)).double()
    matching = Matching.of(keys, 4, special)
    merged, weights = matching.sum(x * sizes) / matching.sum(sizes), matching.sum(sizes)
    for image in range(3):
        values, expected = merged_plainly(keys[image], x[image], sizes[image, :, 0].tolist(), 4, special)
        torch.testing.assert_close(merged[image], values, atol=1e-12, rtol=0)
        assert weights[image, :, 0].tolist() == expected
        places = matching.places(17)[image]
        for token in range(17):
            inside = places == places[token]
            mean = (x[image] * sizes[image])[inside].sum(dim=0) / sizes[image][inside].sum()
            torch.testing.assert_close(merged[image, places[token]], mean, atol=1e-12, rtol=0)


@torch.no_grad()
def test_nothing_merged_is_the_model_itself(model):
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(merge_tokens(model, 0)(images), model(images), atol=1e-12, rtol=0)


@torch.no_grad()
def test_tokens_that_are_the_same_can_be_merged_freely(model):
    """An image of one colour and no positions: each merged token stands for its likes, and the sizes say how many."""
    model.pos_embed.zero_()
    images = torch.ones(2, 3, 32, 32, dtype=torch.float64)
    merging = merge_tokens(model, 3)
    torch.testing.assert_close(merging(images), model(images), atol=1e-10, rtol=0)
    tokens = merging.forward_features(images)
    assert tokens.shape == (2, 17, 32)
    torch.testing.assert_close(tokens, model.forward_features(images), atol=1e-10, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("pool", [0, 2])
def test_a_cut_model_merges_too(model, pool):
    phi = PhiConfig(pool=pool, kernel_size=1)
    cut = skipat_surgery.apply(copy.deepcopy(model), [2, 3], phi).eval()
    for parameter in cut.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    if not pool:  # with clusters, other patches are the seeds
        torch.testing.assert_close(merge_tokens(cut, 0)(images), cut(images), atol=1e-10, rtol=0)
    cut.pos_embed.zero_()
    images = torch.ones_like(images)
    torch.testing.assert_close(merge_tokens(cut, 4)(images), cut(images), atol=1e-10, rtol=0)


def test_a_phi_that_needs_the_grid_is_refused(model):
    cut = skipat_surgery.apply(model, [2], PhiConfig())
    with pytest.raises(ValueError, match=r"on no grid, which the convolution of Φ of block 2 needs .*kernel_size=1"):
        merge_tokens(cut, 2)


@pytest.mark.parametrize("name", ["beitv2_base_patch16_224", "vit_relpos_small_patch16_224", "cait_xxs24_224"])
def test_blocks_that_compute_more_are_refused(name):
    """Relative positions and scales of other names would be left out without a word."""
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 5, "num_heads": 4, "num_classes": 7}
    other = timm.create_model(name, **shape).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with pytest.raises(ValueError, match=r"written for plain pre-norm blocks, and those of \w+ compute more"):
        check_merging(other, torch.randn(2, 3, 32, 32))


def test_plain_blocks_are_not(model):
    check_merging(model, torch.randn(2, 3, 32, 32, dtype=torch.float64))
