"""Every refusal says what was given, what is allowed and what to do, and changes nothing."""

from __future__ import annotations

import copy
import socket

import accelerate
import peft
import pytest
import timm
import torch
import transformers
from cases import case_named
from models import assert_same, cut_of, equations
from small_models import SHAPE, TEXT
from torch import nn

import skipat_surgery
from skipat_surgery import PhiConfig, UnsupportedModelError
from skipat_surgery.tower import Tower


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


@pytest.mark.parametrize("name", ["EomtForUniversalSegmentation", "VideomtForUniversalSegmentation"])
def test_blocks_that_see_queries_cannot_be_skipped(name):
    model = case_named(name).model()
    assert Tower.of(model).skippable == (1, 2, 3, 4, 5)
    refuse(
        model,
        rf"skip names \[6\], but queries join the patches before the last 2 of the 8 blocks of {name}.*1 to 5",
        skip=[2, 6],
    )
    refuse(model, r"skip names \[8\], but .* has 8 blocks; allowed are 1 to 5", skip=[5, 8])


def test_packed_patches_are_refused():
    cut = cut_of(case_named("RadioModel").model())
    patches = torch.randn(8, 3 * 8 * 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"packed \(image_grid_hw\) have no one grid; give it images"):
        cut(patches, image_grid_hw=torch.tensor([[2, 2], [1, 4]]))


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
        ({"expansion": 0.1}, r"from 0.125 to 64, got 0.1"),
        ({"expansion": float("inf")}, r"from 0.125 to 64, got inf"),
        ({"expansion": "2"}, r"expansion must be a number, got '2'"),
        ({"kernel_size": 4}, r"odd, from 1 to 1023, got 4"),
        ({"kernel_size": -1}, r"odd, from 1 to 1023, got -1"),
        ({"kernel_size": 3.0}, r"kernel_size must be an integer, or for videos three, got 3.0"),
        (
            {"kernel_size": (3, 3)},
            r"kernel_size must be an integer, or for videos \(time, height, width\), got \(3, 3\)",
        ),
        ({"kernel_size": (3, 4, 5)}, r"odd, from 1 to 1023, got \(3, 4, 5\)"),
        ({"kernel_size": (3, 3.0, 5)}, r"kernel_size must be an integer, or for videos three, got \(3, 3.0, 5\)"),
        ({"prefix": "drop"}, r"prefix must be one of \('attend', 'mix', 'pass'\), got 'drop'"),
        ({"expansion": 10**20}, r"from 0.125 to 64, got 1"),
        ({"kernel_size": 10**20 + 1}, r"odd, from 1 to 1023, got 1"),
        ({"pool": 10**20}, r"a side from 2 to 1023, got 1"),
        ({"pool": 1}, r"pool must be 0, or a side from 2 to 1023, got 1"),
        ({"queries": "all"}, r"queries must be one of \('clusters', 'patches'\), got 'all'"),
        ({"queries": "patches", "pool": 0}, r"queries='patches' is about clusters: give pool as well"),
        ({"channel_attention": 1}, r"channel_attention must be True or False, got 1"),
    ],
)
def test_bad_phi_config(given, match):
    with pytest.raises(ValueError, match=match):
        PhiConfig(**given)


def test_blocks_that_queries_join_cannot_be_skipped():
    model = transformers.EomtForUniversalSegmentation(transformers.EomtConfig(**SHAPE, num_blocks=2))
    refuse(model, r"skip names \[4, 5\], but queries join the patches before the last 2 of the 6", skip=range(3, 6))


def test_a_kernel_for_videos_on_a_model_of_images(vit, timm_vit):
    for model in (vit, timm_vit):
        refuse(
            model,
            r"kernel_size \(3, 5, 5\) is for a grid of time, height and width, .* height and width: give one odd",
            skip={2: PhiConfig(), 3: PhiConfig(kernel_size=(3, 5, 5))},
        )


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
        lambda: transformers.BertModel(transformers.BertConfig(**TEXT)),
        lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)),
        lambda: transformers.SiglipTextModel(transformers.SiglipTextConfig(**TEXT)),
        lambda: timm.create_model("resnet10t"),
        lambda: timm.create_model("fasternet_t0"),
    ],
    ids=["Linear", "Bert", "CLIP text", "SigLIP text", "ResNet", "FasterNet"],
)
def test_unsupported_models_get_the_list_of_supported_ones(build):
    model = build()
    refuse(
        model,
        rf"{type(model).__name__} holds no vision transformer.*Supported: transformers's ViT and DINO.*; timm's Vision",
        UnsupportedModelError,
    )


def small(model: str, config: str, **kwargs):
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**{**SHAPE, **kwargs}))


def small_timm(name: str, **kwargs):
    return lambda: timm.create_model(name, **kwargs)


def small_hiera(model: str, **kwargs):
    decoder = {"decoder_hidden_size": 8, "decoder_depth": 1, "decoder_num_heads": 1}
    config = transformers.HieraConfig(embed_dim=8, depths=[1, 2, 1, 1], **decoder)
    return lambda: getattr(transformers, model)(config, **kwargs)


ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
REFUSED = {
    "ViTMAE": (small("ViTMAEModel", "ViTMAEConfig"), "shuffles and drops patches.*as a ViTModel"),
    "Kosmos-2.5": (
        lambda: transformers.Kosmos2_5Model(
            transformers.Kosmos2_5Config(
                vision_config={**SHAPE, "head_dim": 8, "patch_embed_hidden_size": 192},
                text_config={"embed_dim": 32, "layers": 2, "ffn_dim": 48, "attention_heads": 4, "vocab_size": 50},
            )
        ),
        "reads the padding behind the patches of each image.*use a plain ViT",
    ),
    "VideoMAE, pre-training": (
        small("VideoMAEForPreTraining", "VideoMAEConfig", num_frames=2, tubelet_size=1),
        "VideoMAEForPreTraining cannot be cut: it drops the patches.*as a VideoMAEModel",
    ),
    "TimeSformer": (small("TimesformerModel", "TimesformerConfig", num_frames=2), "attend twice.*VideoMAE, ViViT"),
    "Hiera, pre-training": (
        small_hiera("HieraForPreTraining"),
        "HieraForPreTraining cannot be cut: it takes units.*at random.*as a HieraModel",
    ),
    "Hiera, patches taken out": (
        small_hiera("HieraModel", is_mae=True),
        "HieraModel cannot be cut: it takes units.*at random.*is_mae=False",
    ),
    "Hiera, as a backbone": (
        small_hiera("HieraBackbone"),
        "HieraBackbone cannot be cut: it does not lay its tokens out in the units.*use a HieraModel",
    ),
    "DPT, hybrid": (
        small("DPTModel", "DPTConfig", is_hybrid=True, backbone_featmap_shape=[1, 1024, 2, 2], image_size=32),
        "convolutional backbone.*is_hybrid=False",
    ),
    "XCiT": (small_timm("xcit_nano_12_p16_224"), "attends over channels"),
    "patch dropout, Hiera": (
        small_timm("hiera_tiny_224", embed_dim=8, stages=(1, 2, 1, 1), patch_drop_rate=0.5),
        r"takes units out in training.*patch_drop_rate=0",
    ),
    "timm's layers one by one": (
        small_timm("swin_tiny_patch4_window7_224", features_only=True),
        'or of a Swin, one by one.*feature_cls="getter"',
    ),
    "parallel blocks": (
        small_timm("vit_tiny_patch16_224", block_fn=timm.models.vision_transformer.ParallelScalingBlock),
        r"blocks of this VisionTransformer are \['ParallelScalingBlock'\].*all are Block or ResPostBlock",
    ),
    "patch dropout": (small_timm("vit_tiny_patch16_224", patch_drop_rate=0.5), r"removes tokens.*patch_drop_rate=0"),
    "patch dropout, NaFlex": (
        small_timm("naflexvit_base_patch16_gap", embed_dim=32, depth=2, num_heads=2, patch_drop_rate=0.5),
        r"removes tokens.*patch_drop_rate=0",
    ),
    "patch dropout, EVA": (
        small_timm("eva02_tiny_patch14_224", depth=2, patch_drop_rate=0.5),
        r"removes tokens.*patch_drop_rate=0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_cut_are_refused_with_the_reason_and_what_to_use(name):
    build, match = REFUSED[name]
    refuse(build(), match, UnsupportedModelError)


def test_two_towers(vit):
    pair = nn.ModuleDict({"left": vit, "right": copy.deepcopy(vit)})
    refuse(
        pair,
        r"holds several vision transformers: left.vit .*tower='left.vit'",
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


def test_meta_device():
    with torch.device("meta"):
        model = transformers.ViTModel(transformers.ViTConfig(**SHAPE))
    with pytest.raises(UnsupportedModelError, match=r"parameters of ViTModel are on the meta device.*load the weights"):
        skipat_surgery.apply(model, [2, 3])


def test_partly_offloaded(vit):
    accelerate.cpu_offload(vit.vit.layers[3])
    with pytest.raises(UnsupportedModelError, match=r"offloaded by accelerate.*cut the plain model first.*remove_hook"):
        skipat_surgery.apply(vit, [2, 3])
    accelerate.hooks.remove_hook_from_submodules(vit)
    skipat_surgery.apply(vit, [2, 3])


def test_a_forward_replaced_from_outside(vit):
    vit.vit.layers[2].forward = lambda x, *args: x
    refuse(vit, r"forward was replaced from outside \(\['vit.layers.2'\]\)", UnsupportedModelError)


def test_hooks_of_the_users_own_still_fire(vit):
    seen = []
    layers = vit.vit.layers
    handles = [
        layers[1].register_forward_hook(lambda *args: seen.append("attended")),
        layers[2].register_forward_hook(lambda *args: seen.append("skipped")),
        layers[2].mlp.register_forward_pre_hook(lambda *args: seen.append("mlp")),
        layers[2].register_full_backward_hook(lambda *args: seen.append("backward")),
    ]
    skipat_surgery.apply(vit, [2, 3])
    vit(torch.randn(1, 3, 32, 32, dtype=torch.float64)).logits.sum().backward()
    assert seen == ["attended", "mlp", "skipped", "backward"]
    skipat_surgery.restore(vit)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", ["timm gemma4"])
def test_patches_with_coordinates_of_their_own_are_refused(name):
    """timm's loaders for images of several sizes give these."""
    case = case_named(name)
    if case.is_too_new:
        pytest.skip(f"this model is there since {case.since}")
    stock = case.model()
    cut = cut_of(stock, [2, 3])
    coordinates = torch.cartesian_prod(torch.arange(2), torch.arange(3)).expand(2, -1, -1)
    patches = {
        "patches": torch.rand(2, 6, 8 * 8 * 3, dtype=torch.float64),
        "patch_coord": coordinates,
        "patch_valid": torch.ones(2, 6, dtype=torch.bool),
    }
    stock(patches)
    with pytest.raises(
        ValueError, match=r"this model was cut, and Φ needs one grid.*images of one size, \(B, C, H, W\)"
    ):
        cut(patches)


@torch.no_grad()
def test_an_image_smaller_than_the_kernel_works():
    case = case_named("timm vit, dynamic size")
    stock, images = case.model(), case.images((8, 16))  # 1×2 patches under a 5×5 kernel
    cut = cut_of(stock, [2, 3])
    with equations(case, stock, cut, images):
        assert_same(case.tensors(cut, images), case.tensors(stock, images))


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
