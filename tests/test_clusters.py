"""Clusters of alike patches, by value."""

from __future__ import annotations

import math

import pytest
import reference
import torch

from skipat_surgery.core.clusters import Clusters
from skipat_surgery.core.padding import attended_tokens


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (1, 6), (3, 2), (3, 4, 2), (2, 2, 5)], ids=str)
@pytest.mark.parametrize(("prefix", "suffix"), [(0, 0), (1, 0), (2, 3)])
def test_patches_join_the_seed_of_greatest_cosine_and_share_its_mean(grid, prefix, suffix):
    torch.manual_seed(0)
    count = math.prod(grid)
    x = torch.randn(3, prefix + count + suffix, 8, dtype=torch.float64)
    clusters = Clusters.of(x, prefix, suffix, grid, 2)
    patches = x[:, prefix : prefix + count]
    seed = reference.seeds(patches, grid, 2)
    means = clusters.means(x)
    special = torch.cat([x[:, :prefix], x[:, prefix + count :]], dim=1)
    assert torch.equal(means[:, : prefix + suffix], special)
    expected = reference.averaging(seed) @ patches
    torch.testing.assert_close(clusters.spread(means[:, prefix + suffix :]), expected, atol=1e-12, rtol=0)
    assert clusters.counts().sum(dim=1).tolist() == [x.shape[1]] * 3
    assert torch.equal(clusters.take(x), torch.cat([special, patches[:, clusters.seeds]], dim=1))


def test_no_cluster_is_empty_where_all_patches_are_the_same():
    x = torch.ones(1, 1 + 16, 4)
    clusters = Clusters.of(x, 1, 0, (4, 4), 2)
    assert clusters.counts().tolist() == [[1, 13, 1, 1, 1]]
    assert torch.equal(clusters.means(x), torch.ones(1, 5, 4))


def test_gradients_reach_the_members():
    torch.manual_seed(0)
    x = torch.randn(2, 1 + 9, 4, dtype=torch.float64, requires_grad=True)
    clusters = Clusters.of(x, 1, 0, (3, 3), 2)
    torch.autograd.gradcheck(lambda x: clusters.spread(clusters.means(x)[:, 1:]), x)


def test_seeds_of_a_video_lie_apart_in_time_too():
    clusters = Clusters.of(torch.randn(1, 3 * 4 * 3, 4), 0, 0, (3, 4, 3), 2)
    assert clusters.seeds.tolist() == [12 * t + 3 * y + x for t in (0, 2) for y in (0, 2) for x in (0, 2)]


def test_masks_of_torchs_own_msa_leave_out_where_true():
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 4 + [True], [False] * 5])
    scores = torch.zeros(5, 5, dtype=torch.bool)
    scores[:, 1] = True  # no token attends to token 1
    by_head = torch.zeros(2 * 3, 5, 5)
    by_head[3:, :, 2] = -torch.inf  # in the second image, no token to token 2
    msa = (x, x, x)
    assert attended_tokens(msa, {"need_weights": False}) is None
    assert torch.equal(attended_tokens(msa, {"key_padding_mask": padding}), ~padding)
    expected = torch.tensor([[True, False, True, True, True]])
    assert torch.equal(attended_tokens(msa, {"attn_mask": scores}), expected)
    found = attended_tokens(msa, {"attn_mask": by_head, "key_padding_mask": padding})
    assert found.tolist() == [[True, True, True, True, False], [True, True, False, True, True]]
