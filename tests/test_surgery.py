"""What `apply` and `restore` promise, on every supported model."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import reference
import torch
from conftest import DEPTH, Case, output_tensors
from torch import nn

import skipat_surgery
from skipat_surgery import PhiConfig
from skipat_surgery.capture import Tower, observe

SKIPS = [range(2, 5), [1, 2, 4], [3, 5]]
PHIS = [PhiConfig.paper(), PhiConfig(), PhiConfig(expansion=0.125, kernel_size=3, channel_attention=False)]


def randomised(model: nn.Module) -> nn.Module:
    """The model with random Φ, so that no part of it is idle as it is in a fresh one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".phi." in name or name.startswith("phi."):
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def final_tokens(case: Case, model: nn.Module, images: torch.Tensor, other_size: bool = False) -> torch.Tensor:
    tower = Tower.of(model)
    with observe(tower, tokens=True) as seen:
        case.other_size(model, images) if other_size else model(images)
    return seen.tokens


def expected_tokens(case: Case, stock: nn.Module, cut: nn.Module, images, skip, **kwargs) -> torch.Tensor:
    tower, cut_tower = stock.get_submodule(case.tower), cut.get_submodule(case.tower)
    if "timm" in case.name:
        return reference.timm_final_tokens(
            tower, cut_tower.blocks, images, set(skip), case.num_prefix_tokens, case.patch_size
        )
    return reference.hf_final_tokens(
        tower, cut_tower.layers, images, set(skip), case.num_prefix_tokens, case.patch_size, **kwargs
    )


@torch.no_grad()
@pytest.mark.parametrize("skip", SKIPS, ids=str)
@pytest.mark.parametrize("phi", PHIS, ids=["paper", "default", "narrow"])
def test_cut_model_equals_the_papers_equations(case: Case, skip, phi):
    stock = case.model()
    cut = randomised(skipat_surgery.apply(copy.deepcopy(stock), skip, phi))
    images = case.images()
    found = final_tokens(case, cut, images)
    expected = expected_tokens(case, stock, cut, images, skip)
    assert (found - final_tokens(case, stock, images)).abs().max() > 1e-3  # the cut is no idle operation
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 64), (64, 16), (48, 40)], ids=str)
def test_phi_knows_the_true_grid_at_other_sizes(case: Case, size):
    if case.other_size is None:
        pytest.skip("the host takes only its configured size")
    stock = case.model()
    cut = randomised(skipat_surgery.apply(copy.deepcopy(stock), [2, 3]))
    images = case.images(*size)
    kwargs = {} if "timm" in case.name else {"interpolate_pos_encoding": True}
    expected = expected_tokens(case, stock, cut, images, [2, 3], **kwargs)
    torch.testing.assert_close(final_tokens(case, cut, images, other_size=True), expected, atol=1e-10, rtol=0)


@torch.no_grad()
def test_phi_follows_timms_set_input_size(timm_vit):
    stock = copy.deepcopy(timm_vit)
    cut = randomised(skipat_surgery.apply(timm_vit, [2, 3]))
    for model in (stock, cut):
        model.set_input_size(img_size=(16, 48))
    images = torch.randn(2, 3, 16, 48, dtype=torch.float64)
    expected = reference.timm_final_tokens(stock, cut.blocks, images, {2, 3}, 1, 8)
    torch.testing.assert_close(cut.forward_features(images), expected, atol=1e-10, rtol=0)


@torch.no_grad()
def test_restore_is_bit_exact(case: Case):
    model = case.model()
    images, before = case.images(), copy.deepcopy(model.state_dict())
    classes = [type(module) for module in model.modules()]
    outputs = output_tensors(model(images))
    skipat_surgery.restore(skipat_surgery.apply(model, [2, 3, 5]))
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == list(before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for found, expected in zip(output_tensors(model(images)), outputs, strict=True):
        assert torch.equal(found, expected)
    assert not [name for module in model.modules() for name in vars(module) if "skipat" in name]


def test_restore_follows_dtype_and_mode(vit):
    skipat_surgery.apply(vit, [2, 3])
    skipat_surgery.restore(vit.float().train())
    assert {parameter.dtype for parameter in vit.parameters()} == {torch.float32}
    assert all(module.training for module in vit.modules())


@torch.no_grad()
def test_a_fresh_phi_reuses_z():
    torch.manual_seed(0)
    z = torch.randn(4, 2 + 3 * 5, 32)
    for expansion, error in [(2.0, 2e-3), (1.0, 2e-3), (0.5, 0.6), (0.25, 0.8)]:
        phi = skipat_surgery.Phi(32, 2, PhiConfig(expansion=expansion))
        out = phi(z, (3, 5))
        torch.testing.assert_close(out[:, :2], z[:, :2])
        # A projection onto h of D random directions leaves (D - h) / D of the variance.
        assert (out - z)[:, 2:].square().mean() / z[:, 2:].square().mean() < error


def test_gradients_by_value_with_and_without_checkpointing(case: Case):
    model = randomised(skipat_surgery.apply(case.model(), [2, 3, 5])).train()
    images = case.images()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        sum(out.square().mean() for out in output_tensors(model(images))).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    phis = [name for name, _ in model.named_parameters() if "phi." in name]
    assert set(phis) <= set(plain)
    # A class token read after the last block sees nothing of that block's patches; everything else must get a gradient.
    assert all(plain[name].abs().max() > 0 for name in phis if f".{DEPTH - 1}." not in name)
    if "timm" in case.name:
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-12, rtol=1e-9, msg=name)


def test_two_forwards_before_one_backward(vit):
    cut = randomised(skipat_surgery.apply(vit, [2, 3])).train()
    first, second = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64)
    (cut(first).logits.sum() + cut(second).logits.sum()).backward()
    together = {name: p.grad.clone() for name, p in cut.named_parameters()}
    cut.zero_grad()
    for images in (first, second):
        cut(images).logits.sum().backward()
    for name, parameter in cut.named_parameters():
        torch.testing.assert_close(parameter.grad, together[name], msg=name)


@torch.no_grad()
def test_copies_and_pickles_give_the_same_output(case: Case):
    cut = randomised(skipat_surgery.apply(case.model(), [2, 3, 5]))
    images = case.images()
    expected = output_tensors(cut(images))
    for twin in (copy.deepcopy(cut), pickle.loads(pickle.dumps(cut))):
        for found, value in zip(output_tensors(twin(images)), expected, strict=True):
            assert torch.equal(found, value)
        skipat_surgery.restore(twin)
    assert len(output_tensors(cut(images))) == len(expected)  # restoring a copy leaves the original cut
    assert torch.equal(output_tensors(cut(images))[0], expected[0])


@torch.no_grad()
def test_six_threads_share_one_model(vit):
    cut = randomised(skipat_surgery.apply(vit, [2, 3, 5]))
    batches = torch.randn(6, 4, 3, 32, 32, dtype=torch.float64)
    expected = [cut(images).logits for images in batches]
    wrong = []

    def work(index: int) -> None:
        for _ in range(20):
            with torch.no_grad():
                if not torch.allclose(cut(batches[index]).logits, expected[index], atol=1e-12):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@torch.no_grad()
@pytest.mark.parametrize("which", ["vit", "timm_vit"])
def test_compile_fullgraph_equals_eager(which, request):
    cut = randomised(skipat_surgery.apply(request.getfixturevalue(which), [2, 3, 5]))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    compiled = torch.compile(cut, fullgraph=True, backend="aot_eager")
    for found, expected in zip(output_tensors(compiled(images)), output_tensors(cut(images)), strict=True):
        torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_hidden_states_have_the_stock_structure(vit):
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    stock = vit(images, output_hidden_states=True).hidden_states
    cut = skipat_surgery.apply(vit, [2, 3])(images, output_hidden_states=True).hidden_states
    assert len(cut) == len(stock) == DEPTH + 1
    for index, (found, expected) in enumerate(zip(cut, stock, strict=True)):
        assert torch.equal(found, expected) == (index <= 2), index  # the cut changes nothing before block 2


@torch.no_grad()
def test_timm_intermediates_have_the_stock_structure(timm_vit):
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    stock = timm_vit.forward_intermediates(images, intermediates_only=True)
    cut = skipat_surgery.apply(timm_vit, [2, 3]).forward_intermediates(images, intermediates_only=True)
    for index, (found, expected) in enumerate(zip(cut, stock, strict=True)):
        assert found.shape == expected.shape
        assert torch.equal(found, expected) == (index < 2), index


def test_dropped_weights_are_gone_and_all_the_rest_keeps_its_name(case: Case):
    stock = case.model()
    cut = skipat_surgery.apply(copy.deepcopy(stock), [2, 3])
    kept = {name for name in cut.state_dict() if ".phi." not in name}
    gone = set(stock.state_dict()) - kept
    assert kept <= set(stock.state_dict())
    assert gone
    assert all(any(f".{index}." in name for index in (2, 3)) for name in gone)
    assert not any("mlp" in name for name in gone)


@torch.no_grad()
def test_a_phi_of_its_own_for_each_block(vit):
    phis = {2: PhiConfig(expansion=0.25), 4: PhiConfig.paper()}
    cut = skipat_surgery.apply(vit, skip=phis)
    assert cut.vit.layers[2].phi.expand.out_features == 8
    assert cut.vit.layers[4].phi.expand.out_features == 64
    assert cut.config.skipat["phi"].keys() == {"2", "4"}


def test_half_precision_and_autocast_run(vit):
    images = torch.randn(2, 3, 32, 32)
    cut = skipat_surgery.apply(vit.float(), [2, 3])
    full = cut(images).logits
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(cut(images).logits.float(), full, atol=0.1, rtol=0.1)
    torch.testing.assert_close(
        copy.deepcopy(cut).bfloat16()(images.bfloat16()).logits.float(), full, atol=0.1, rtol=0.1
    )


def test_a_model_cut_in_half_precision_has_a_half_precision_phi(vit):
    cut = skipat_surgery.apply(vit.bfloat16(), [2])
    assert {parameter.dtype for parameter in cut.parameters()} == {torch.bfloat16}
