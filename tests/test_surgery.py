"""What `apply` and `restore` promise beyond the contract, and what the contract's reference rests on."""

from __future__ import annotations

import copy
import pickle

import pytest
import reference
import timm
import torch
import transformers
from cases import Case, case_named
from models import cut_of, equations

import skipat_surgery
from skipat_surgery import PhiConfig
from skipat_surgery.core import modeling
from skipat_surgery.core.carrying import carried_or_none
from skipat_surgery.measure.memory import weight_bytes
from skipat_surgery.observing import observe
from skipat_surgery.tower import Tower

BLOCK_BY_BLOCK = {
    "ViTModel": (reference.vit_final_tokens, "layers"),
    "DeiTModel": (reference.vit_final_tokens, "layers"),
    "timm vit": (reference.timm_final_tokens, "blocks"),
    "timm vit, registers": (reference.timm_final_tokens, "blocks"),
    "timm vit, pre-norm": (reference.timm_final_tokens, "blocks"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", BLOCK_BY_BLOCK)
@pytest.mark.parametrize("skip", [range(2, 5), [1, 2, 4], [3, 5]], ids=str)
def test_the_contracts_reference_equals_a_loop_over_the_blocks(name, skip):
    case: Case = case_named(name)
    stock, images = case.model(), case.images()
    cut = cut_of(stock, skip)
    final_tokens, blocks = BLOCK_BY_BLOCK[name]
    expected = final_tokens(stock, getattr(cut, blocks), images, set(skip), case.prefix, case.patch)
    with equations(case, stock, cut, images), observe(Tower.of(stock), tokens=True) as by_hooks:
        case.call(stock, images)
    with observe(Tower.of(cut), tokens=True) as by_surgery:
        case.call(cut, images)
    torch.testing.assert_close(by_hooks.tokens, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(by_surgery.tokens, expected, atol=1e-10, rtol=0)


@torch.no_grad()
def test_phi_follows_timms_set_input_size(timm_vit):
    stock = copy.deepcopy(timm_vit)
    cut = cut_of(timm_vit, [2, 3])
    for model in (stock, cut):
        model.set_input_size(img_size=(16, 48))
    images = torch.randn(2, 3, 16, 48, dtype=torch.float64)
    expected = reference.timm_final_tokens(stock, cut.blocks, images, {2, 3}, 1, 8)
    torch.testing.assert_close(cut.forward_features(images), expected, atol=1e-10, rtol=0)


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
        phi = skipat_surgery.Phi(32, 2, PhiConfig(expansion=expansion, prefix="mix", pool=0, reads_x=False))
        out = phi(z, (3, 5))
        torch.testing.assert_close(out[:, :2], z[:, :2])
        # A projection onto h of D random directions leaves (D - h) / D of the variance.
        assert (out - z)[:, 2:].square().mean() / z[:, 2:].square().mean() < error


@torch.no_grad()
def test_a_phi_of_its_own_for_each_block(vit):
    phis = {2: PhiConfig(expansion=0.25), 4: PhiConfig.paper()}
    cut = skipat_surgery.apply(vit, skip=phis)
    assert cut.vit.layers[2].phi.expand.out_features == 8
    assert cut.vit.layers[4].phi.expand.out_features == 64
    assert cut.config.skipat["phi"].keys() == {"2", "4"}


@torch.no_grad()
def test_without_gradients_a_block_uses_its_z_up(vit):
    """Kept hidden states then do not keep every Z alive; a second call on the same ones is an error, never a guess."""
    model = skipat_surgery.apply(vit, [2, 3]).eval()
    seen = []
    for block in model.vit.layers:
        block.register_forward_pre_hook(lambda module, args: seen.append((module, args[0])))
    model(torch.randn(1, 3, 32, 32))
    assert [state[1] for _, x in seen if (state := carried_or_none(x))] == [None] * 5
    block, x = seen[2]
    with pytest.raises(RuntimeError, match="twice"):
        block(x)


def test_what_was_removed_is_kept_for_restore_and_can_be_forgotten(vit):
    untouched = weight_bytes(vit)
    removed = sum(
        p.nbytes
        for i in (2, 3)
        for slot in ("attention", "layernorm_before")
        for p in getattr(vit.vit.layers[i], slot).parameters()
    )
    skipat_surgery.apply(vit, [2, 3], PhiConfig(prefix="mix", pool=0, reads_x=False))
    phis = sum(p.nbytes for i in (2, 3) for p in vit.vit.layers[i].phi.parameters())
    assert weight_bytes(vit) == untouched + phis
    skipat_surgery.forget(vit)
    assert weight_bytes(vit) == untouched + phis - removed
    with pytest.raises(ValueError, match="told to forget it"):
        skipat_surgery.restore(vit)


def test_apply_without_keeping_what_was_removed(vit):
    kept = skipat_surgery.apply(copy.deepcopy(vit), [2, 3], PhiConfig.paper())
    lean = skipat_surgery.apply(vit, [2, 3], PhiConfig.paper(), keep_removed=False)
    assert len(pickle.dumps(lean)) < len(pickle.dumps(kept))
    assert weight_bytes(lean) == sum(p.nbytes for p in (*lean.parameters(), *lean.buffers()))
    with pytest.raises(ValueError, match="keep_removed=False"):
        skipat_surgery.restore(lean)


def test_forget_needs_a_cut_model(vit):
    with pytest.raises(ValueError, match="nothing to forget"):
        skipat_surgery.forget(vit)


def test_restore_and_report_see_every_tower(vit):
    other = case_named("timm vit").model()
    both = torch.nn.ModuleDict({"first": vit, "second": other})
    before = [type(module) for module in both.modules()]
    skipat_surgery.apply(both["first"], [2, 3])
    skipat_surgery.apply(both["second"], [4])
    report = skipat_surgery.report(both)
    assert [tower.path for tower in report.towers] == ["first.vit", "second"]
    assert report.macs_after == sum(skipat_surgery.report(model).macs_after for model in both.values())
    assert [block.index for block in report.blocks if block.phi] == [2, 3, 4]
    with pytest.raises(skipat_surgery.UnsupportedModelError, match=r"several cut vision transformers.*first\.vit"):
        Tower.of(both)
    skipat_surgery.restore(both)
    assert [type(module) for module in both.modules()] == before


def test_a_config_whose_auto_classes_give_another_models_class(tmp_path):
    """ShieldGemma 2 builds its inside by an Auto class that gives Gemma 3's: it is cut, but could not be loaded cut."""
    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 4}
    text = {**small, "num_hidden_layers": 1, "num_key_value_heads": 1, "vocab_size": 64, "head_dim": 16}
    vision = {**small, "image_size": 32, "patch_size": 8}
    config = transformers.ShieldGemma2Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = transformers.ShieldGemma2ForImageClassification(config).eval()
    before = [type(module) for module in model.modules()]
    skipat_surgery.apply(model, [2])
    with pytest.raises(NotImplementedError, match=r"from its config alone.*skipat_surgery\.save\(model, dir"):
        model.save_pretrained(tmp_path)
    skipat_surgery.restore(model)
    assert [type(module) for module in model.modules()] == before


def test_an_apply_that_fails_late_changes_nothing(vit, monkeypatch):
    before, keys = [type(module) for module in vit.modules()], list(vit.state_dict())
    monkeypatch.setattr(modeling, "register_config", lambda stock: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        skipat_surgery.apply(vit, [2, 3])
    assert [type(module) for module in vit.modules()] == before
    assert list(vit.state_dict()) == keys
    assert not hasattr(vit.config, "skipat")


def test_a_model_without_a_tower_is_refused_for_that():
    with pytest.raises(skipat_surgery.UnsupportedModelError, match="FasterNet holds no vision transformer"):
        skipat_surgery.apply(timm.create_model("fasternet_t0"), [2])
