"""Φ itself: against the plain reference, and the affine maps that can be written into it."""

from __future__ import annotations

import math
from functools import reduce

import pytest
import reference
import torch
from timm.layers import Attention
from torch import nn

from skipat_surgery import Phi, PhiConfig
from skipat_surgery.core.clusters import Clustered
from skipat_surgery.core.depthwise import DepthwiseConv2d, depthwise
from skipat_surgery.measure.memory import peak_memory

CONFIGS = [
    PhiConfig.paper(),
    PhiConfig(),
    PhiConfig(expansion=0.125, kernel_size=1, channel_attention=False, prefix="pass", pool=0),
    PhiConfig(expansion=3, kernel_size=7, prefix="mix", pool=3),
    PhiConfig(pool=2, reads_x=False),
    PhiConfig(expansion=3, channel_attention=True),
    PhiConfig(queries="patches"),
]
VIDEO_CONFIGS = [PhiConfig(kernel_size=(1, 3, 5)), PhiConfig(kernel_size=[5, 1, 3], prefix="mix", pool=0)]


def random_phi(config: PhiConfig, prefix: int = 1, axes: int = 2) -> Phi:
    torch.manual_seed(0)
    phi = Phi(16, prefix, config, axes=axes).double()
    with torch.no_grad():
        for parameter in phi.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return phi


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS + VIDEO_CONFIGS)
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("grid", [(4, 4), (2, 8), (8, 2), (1, 5), (3, 2, 5), (4, 4, 1), (1, 2, 3)], ids=str)
def test_equals_the_plain_reference(config, prefix, grid):
    if config in VIDEO_CONFIGS and len(grid) == 2:
        pytest.skip("a kernel for videos")
    phi = random_phi(config, prefix, len(grid))
    z = torch.randn(3, prefix + math.prod(grid), 16, dtype=torch.float64)
    x = torch.randn_like(z)
    seed = reference.seeds(x[:, prefix:], grid, config.pool) if config.pool else None
    expected = reference.phi(dict(phi.named_parameters()), z, prefix, grid, x, seed)
    given = {"x": x} if config.reads_x else {}
    if phi.attends:
        given["rows"] = expected[:, :prefix] = torch.randn(3, prefix, 16, dtype=torch.float64)
    if config.pool:
        clusters = phi.clusters(x, grid)
        means = clusters.means(x)[:, prefix:]
        coarse = torch.randn_like(means if config.queries == "clusters" else z[:, prefix:])
        given["clustered"] = Clustered(clusters, means, coarse)
        expected[:, prefix:] += clusters.spread(coarse) if config.queries == "clusters" else coarse
    torch.testing.assert_close(phi(z, grid, **given), expected, atol=1e-12, rtol=0)


def test_rows_of_tokens_that_attend_must_be_given():
    with pytest.raises(ValueError, match="the prefix tokens of this Φ attend: it must be given their rows"):
        random_phi(PhiConfig(prefix="attend", pool=0))(torch.randn(2, 1 + 4, 16, dtype=torch.float64), (2, 2))


@pytest.mark.parametrize("config", [PhiConfig(pool=0, prefix="pass"), PhiConfig(reads_x=False, prefix="pass")])
def test_all_that_phi_reads_must_be_given(config):
    with pytest.raises(ValueError, match="this Φ reads more than Z: it must be given x, and where it has clusters"):
        random_phi(config)(torch.randn(2, 1 + 4, 16, dtype=torch.float64), (2, 2))


def test_the_papers_phi_has_the_papers_parameters():
    d = 16
    assert sum(p.numel() for p in Phi(d, 1, PhiConfig.paper()).parameters()) == 4 * d * d + 55 * d + 3


@torch.no_grad()
@pytest.mark.parametrize("eca", [True, False])
@pytest.mark.parametrize("expansion", [1.0, 2.0])
@pytest.mark.parametrize("grid", [(4, 6), (2, 4, 3)], ids=str)
def test_an_affine_map_is_written_exactly(expansion, eca, grid):
    torch.manual_seed(0)
    config = PhiConfig(expansion=expansion, channel_attention=eca, pool=0, reads_x=False)
    phi = Phi(32, 0, config, axes=len(grid)).double()
    weight, bias = torch.randn(32, 32, dtype=torch.float64), torch.randn(32, dtype=torch.float64)
    encode = 0.5 * torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))[0]
    phi.set_patch_map(encode, weight @ encode.inverse(), bias)
    z = torch.randn(64, 4 * 6, 32, dtype=torch.float64)
    expected = z @ weight.T + bias
    error = (phi(z, grid) - expected).square().mean() / expected.var()
    assert error < 1e-4  # what GELU leaves of the identity at 4 ± 0.5


def test_a_map_that_needs_more_units_is_refused():
    phi = Phi(32, 0, PhiConfig(expansion=0.5))
    with pytest.raises(ValueError, match="Φ has 16 hidden units, the map needs 32"):
        phi.set_patch_map(torch.eye(32), torch.eye(32), torch.zeros(32))


def test_a_wrong_grid_is_refused():
    phi = Phi(8, 1, PhiConfig())
    with pytest.raises(ValueError, match=r"given 17 tokens, but 1 prefix tokens and a 4×5 patch grid make 21"):
        phi(torch.randn(1, 17, 8), (4, 5))
    with pytest.raises(ValueError, match=r"and a 2×3×4 patch grid make 25"):
        Phi(8, 1, PhiConfig(), axes=3)(torch.randn(1, 17, 8), (2, 3, 4))


def test_in_training_the_papers_phi_keeps_no_more_than_the_msa_that_it_replaces():
    dim, grid, depth = 64, (16, 16), 6
    msas = [nn.Sequential(nn.LayerNorm(dim), Attention(dim, qkv_bias=True)) for _ in range(depth)]
    phis = [Phi(dim, 1, PhiConfig.paper()) for _ in range(depth)]
    z = torch.randn(8, 1 + 16 * 16, dim, requires_grad=True)

    def kept(functions):
        """In tensors of the size of Z, for each function of the chain."""
        return peak_memory(lambda: reduce(lambda x, function: function(x), functions, z), z.device) / z.nbytes / depth

    by_msa, by_phi = kept(msas), kept([lambda z, phi=phi: phi(z, grid) for phi in phis])
    assert by_phi < 1.01 * by_msa  # the last Φ's passing tensors, which the peak holds as well, are within the 1 %


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (7, 7), (3, 3, 3), (1, 5, 3)], ids=str)
def test_bf16_gradients_of_the_depthwise_convolution(kernel, autocast):
    """As close to float64's as rounding allows."""
    torch.manual_seed(0)
    stock = nn.Conv2d if len(kernel) == 2 else nn.Conv3d
    middle = tuple(side // 2 for side in kernel)
    mine, reference = depthwise(24, kernel), stock(24, 24, kernel, padding=middle, groups=24)
    mine.to(torch.float32 if autocast else torch.bfloat16)
    reference.double().load_state_dict(mine.state_dict())
    x = torch.randn(3, 24, *(4, 7, 9)[-len(kernel) :]).bfloat16()
    inputs, expected_inputs = x.clone().requires_grad_(), x.double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = mine(inputs)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    reference(expected_inputs).backward(gradient.double())
    for found, expected in (
        (inputs.grad, expected_inputs.grad),
        (mine.weight.grad, reference.weight.grad),
        (mine.bias.grad, reference.bias.grad),
    ):
        error = (found.double() - expected).norm() / expected.norm()
        assert error < torch.finfo(torch.bfloat16).eps
    assert out.dtype == torch.bfloat16


def test_second_derivatives_of_a_wide_depthwise_convolution():
    torch.manual_seed(0)
    convolution = DepthwiseConv2d(4, 5).bfloat16()
    x = torch.randn(2, 4, 6, 6).bfloat16().requires_grad_()
    (first,) = torch.autograd.grad(convolution(x).float().square().sum(), x, create_graph=True)
    first.float().sum().backward()
    reference, y = nn.Conv2d(4, 4, 5, padding=2, groups=4).double(), x.detach().double().requires_grad_()
    reference.load_state_dict(convolution.state_dict())
    (expected,) = torch.autograd.grad(reference(y).square().sum(), y, create_graph=True)
    expected.sum().backward()
    torch.testing.assert_close(x.grad.double(), y.grad, atol=0.03 * y.grad.abs().max().item(), rtol=0.02)


def test_training_with_a_wide_kernel_in_bf16_takes_no_workspace_of_many_times_z():
    convolution = DepthwiseConv2d(64, 5).bfloat16()
    x = torch.randn(2, 64, 32, 32).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn_like(x)
    peak = peak_memory(lambda: convolution(x).backward(gradient), x.device)
    assert peak < 16 * x.nbytes  # oneDNN's own backward takes 25 times the input, and more
