"""Every refusal says what was given, what is allowed and what to do, and changes nothing."""

from __future__ import annotations

import copy
import socket

import peft
import pytest
import torch
import transformers
from torch import nn

import skipat_surgery
from skipat_surgery import PhiConfig, UnsupportedModelError


def refuse(model: nn.Module, match: str, error: type[Exception] = ValueError, **kwargs) -> None:
    """Applying must raise this, and leave every parameter, class and attribute as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    with pytest.raises(error, match=match):
        skipat_surgery.apply(model, **{"skip": [2, 3], **kwargs})
    assert [type(module) for module in model.modules()] == classes
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("skip", "error", "match"),
    [
        ([], ValueError, r"skip is empty: name at least one block"),
        ([0, 1], ValueError, r"block 0 cannot be skipped.*allowed are 1 to 5"),
        (
            [4, 6, 9],
            ValueError,
            r"skip names \[6, 9\], but ViTForImageClassification has 6 blocks; allowed are 1 to 5",
        ),
        ([-1], ValueError, r"skip names \[-1\].*allowed are 1 to 5"),
        ([2, 3, 2], ValueError, r"more than once: \[2\]"),
        ("3-8", TypeError, r"skip must be an iterable of block indices such as range\(3, 9\).*'3-8'"),
        (3, TypeError, r"skip must be an iterable.*got 3"),
        ([2.0], TypeError, r"skip must hold block indices \(integers\), got 2.0"),
        ([True], TypeError, r"integers\), got True"),
        ({2: 0.5}, TypeError, r"the Φ of block 2 must be a PhiConfig, got 0.5"),
    ],
)
def test_bad_skip(vit, skip, error, match):
    refuse(vit, match, error, skip=skip)


def test_bad_phi(vit):
    refuse(vit, r"phi must be a PhiConfig, got 0.5", TypeError, phi=0.5)
    refuse(
        vit,
        r"already gives a PhiConfig for each block; leave phi out",
        skip={2: PhiConfig()},
        phi=PhiConfig(),
    )


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"expansion": 0.1}, r"at least 0.125 and finite, got 0.1"),
        ({"expansion": float("inf")}, r"at least 0.125 and finite, got inf"),
        ({"expansion": "2"}, r"expansion must be a number, got '2'"),
        ({"kernel_size": 4}, r"odd and positive \(1, 3, 5, …\), got 4"),
        ({"kernel_size": -1}, r"odd and positive"),
        ({"kernel_size": 3.0}, r"kernel_size must be an integer, got 3.0"),
        ({"prefix": "drop"}, r"prefix must be one of \('mix', 'pass'\), got 'drop'"),
        ({"channel_attention": 1}, r"channel_attention must be True or False, got 1"),
    ],
)
def test_bad_phi_config(given, match):
    with pytest.raises(ValueError, match=match):
        PhiConfig(**given)


def test_already_cut(vit):
    skipat_surgery.apply(vit, [2])
    refuse(vit, r"is already cut; call skipat_surgery.restore\(model\) first")


def test_nothing_to_restore(vit):
    with pytest.raises(ValueError, match="is not cut, so there is nothing to restore"):
        skipat_surgery.restore(vit)


def test_nothing_to_report(vit):
    with pytest.raises(ValueError, match=r"is not cut: call skipat_surgery.apply"):
        skipat_surgery.report(vit)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(4, 4),
        lambda: transformers.SwinModel(transformers.SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 1])),
        lambda: transformers.BertModel(
            transformers.BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=1, intermediate_size=8)
        ),
    ],
    ids=["Linear", "Swin", "Bert"],
)
def test_unsupported_models_get_the_list_of_supported_ones(build):
    model = build()
    refuse(
        model,
        rf"{type(model).__name__} holds no vision transformer.*Supported: ViT, DINO",
        UnsupportedModelError,
    )


def test_unsupported_block(timm_vit):
    import timm

    parallel = timm.create_model("vit_tiny_patch16_224", block_fn=timm.models.vision_transformer.ParallelScalingBlock)
    refuse(parallel, r"block 0 .* is a .*ParallelScalingBlock, where .* has .*\.Block", UnsupportedModelError)


def test_timm_models_that_lose_the_grid():
    import timm

    dropping = timm.create_model("vit_tiny_patch16_224", patch_drop_rate=0.5)
    refuse(dropping, r"patch dropout removes tokens.*patch_drop_rate=0", UnsupportedModelError)


def test_two_towers(vit):
    pair = nn.ModuleDict({"left": vit, "right": copy.deepcopy(vit)})
    refuse(
        pair,
        r"holds several vision transformers: left.vit .*model.get_submodule\('left.vit'\)",
        UnsupportedModelError,
    )


def test_data_parallel(vit):
    refuse(nn.DataParallel(vit), r"wrapped for data parallel.*model.module", UnsupportedModelError)


@pytest.fixture
def process_group():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_wrappers(vit):
    refuse(nn.parallel.DistributedDataParallel(vit), r"wrapped for data parallel", UnsupportedModelError)
    sharded = torch.distributed.fsdp.fully_shard(vit, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(UnsupportedModelError, match=r"wrapped by FSDP; cut the plain model first, then wrap"):
        skipat_surgery.apply(sharded, [2, 3])


def test_compiled(vit):
    refuse(torch.compile(vit), r"is compiled; cut the plain model first, then compile", UnsupportedModelError)


def test_quantised(vit):
    dynamic = torch.ao.quantization.quantize_dynamic(vit.float(), {nn.Linear})
    with pytest.raises(UnsupportedModelError, match=r"is quantised; cut the plain model first, then quantise"):
        skipat_surgery.apply(dynamic, [2, 3])


def test_peft(vit):
    adapted = peft.get_peft_model(vit, peft.LoraConfig(target_modules=["q_proj"]))
    refuse(adapted, r"adapted by PEFT; cut the plain model first, then add adapters", UnsupportedModelError)


def test_a_stray_hidden_state_is_an_error(vit):
    skipat_surgery.apply(vit, [2, 3])
    tokens = torch.randn(1, 17, 32, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"do not carry the patch grid and Z"):
        vit.vit.layers[2](tokens)


def test_a_hook_between_blocks_that_makes_a_new_tensor_is_an_error(vit):
    skipat_surgery.apply(vit, [2, 3])
    vit.vit.layers[1].mlp.register_forward_hook(lambda module, args, output: output + 0)  # inside a block: fine
    vit(torch.randn(1, 3, 32, 32, dtype=torch.float64))
    vit.vit.embeddings.register_forward_hook(lambda module, args, output: output + 0)
    vit(torch.randn(1, 3, 32, 32, dtype=torch.float64))

    class Noisy(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x, *args, **kwargs):
            return self.block(x, *args, **kwargs) + 0

    vit.vit.layers[2] = Noisy(vit.vit.layers[2])
    with pytest.raises(RuntimeError, match=r"do not carry the patch grid and Z"):
        vit(torch.randn(1, 3, 32, 32, dtype=torch.float64))
