"""Cut blocks and Φ write over what passes between their parts where nobody can see it, and there alone."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import small_models
import timm
import torch
from torch import Tensor, nn

import skipat_surgery
from skipat_surgery import PhiConfig
from skipat_surgery.core.in_place import IN_PLACE, InPlaceActivation, in_place
from skipat_surgery.measure.memory import peak_memory

WIDE = {"hidden_size": 64, "intermediate_size": 256, "image_size": 128}
HOSTS = {
    "ViT": small_models.hf("ViTModel", "ViTConfig", **WIDE),
    "DINOv2": small_models.hf("Dinov2Model", "Dinov2Config", **WIDE),
    "CLIP": small_models.hf("CLIPVisionModel", "CLIPVisionConfig", **WIDE),
    "SigLIP": small_models.hf("SiglipVisionModel", "SiglipVisionConfig", **WIDE),
    "DPT": small_models.hf("DPTModel", "DPTConfig", **{**small_models.DPT, **WIDE}),
    "timm vit": small_models.timm_model("vit_tiny_patch16_224", img_size=128, mlp_ratio=4),
    "timm vit, res-post": small_models.timm_model("vit_srelpos_small_patch16_224", img_size=128, mlp_ratio=4),
    "timm eva02": small_models.timm_model("eva02_tiny_patch14_224", img_size=128, mlp_ratio=8 / 3),
}


def activations() -> list[Any]:
    """One of each class in the table that the installed hosts have."""
    found = []
    for path in IN_PLACE:
        module, _, name = path.rpartition(".")
        if hasattr(importlib.import_module(module), name):
            found.append(getattr(importlib.import_module(module), name)())
    return [*found, nn.GELU("tanh")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", activations(), ids=lambda module: f"{type(module).__module__} {module}")
def test_in_place_is_the_same_function(activation, dtype):
    x = 3 * torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected, given = activation(x.clone()), x.clone()
    found = in_place(activation)(activation, given)
    assert found.data_ptr() == given.data_ptr()
    assert torch.equal(found, expected)


def test_the_table_names_classes_that_are_there():
    assert len(activations()) >= len(IN_PLACE)  # with the newest hosts, none has moved


def test_other_activations_are_left_alone():
    class MyGELU(nn.GELU):
        def forward(self, x: Tensor) -> Tensor:
            return x

    assert in_place(MyGELU()) is None
    assert in_place(nn.ReLU()) is None
    gelu_python = small_models.hf("ViTModel", "ViTConfig", hidden_act="gelu_python")()
    assert in_place(gelu_python.layers[0].mlp.activation_fn) is None


def cut_vit() -> Any:
    torch.manual_seed(0)
    return skipat_surgery.apply(timm.create_model("test_vit", img_size=32, depth=6).eval(), [3, 4])


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_the_skipped_blocks_and_the_one_that_feeds_them_have_it_and_no_other():
    model = cut_vit()
    assert [isinstance(block.mlp.act, InPlaceActivation) for block in model.blocks] == [
        False,
        False,
        *[True] * 3,
        False,
    ]
    assert "mlp.act" not in "".join(model.state_dict())
    assert list(model.blocks[3].mlp.act.modules()) == [model.blocks[3].mlp.act]
    other = copy.deepcopy(model)
    assert other.blocks[3].mlp.act.skipat_mlp is other.blocks[3].mlp


def test_the_output_is_the_same_to_the_bit():
    model = cut_vit()
    found = model(images())  # with gradients: the host's own activation
    with torch.no_grad():
        assert torch.equal(model(images()), found.detach())


def observed(model: Any, place: str) -> list[Tensor]:
    """What hooks keep of the input and the output of the activation, and of the parts of Φ, in every block."""
    kept: list[Tensor] = []

    def keep_output(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):  # a cut block gives (x, z)
            kept.append(output)

    def keep_input(module: nn.Module, args: Any) -> None:
        kept.append(args[0])

    mlps = [block.mlp for block in model.blocks]
    if place == "every module":
        handles = [nn.modules.module.register_module_forward_hook(keep_output)]
    elif place == "Φ":
        parts = [part for block in model.blocks if hasattr(block, "phi") for part in block.phi.modules()]
        handles = [part.register_forward_hook(keep_output) for part in parts]
    elif place == "fc1":
        handles = [mlp.fc1.register_forward_hook(keep_output) for mlp in mlps]
    else:
        handles = [mlp.act.register_forward_pre_hook(keep_input) for mlp in mlps]
    try:
        model(images())
    finally:
        for handle in handles:
            handle.remove()
    return kept


@pytest.mark.parametrize("place", ["fc1", "activation", "Φ", "every module"])
def test_a_hook_sees_what_it_would_see_in_the_host(place):
    model = cut_vit()
    expected = observed(model, place)
    with torch.no_grad():
        found = observed(model, place)
    assert len(found) == len(expected) >= 6
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs.detach())


@torch.no_grad()
@pytest.mark.parametrize("phi", [PhiConfig(pool=0), PhiConfig.paper()], ids=["no clusters", "paper"])
@pytest.mark.parametrize("host", HOSTS)
def test_a_forward_peaks_no_higher_than_the_untouched_models(host, phi):
    """Weights apart."""
    model = HOSTS[host]().eval()
    batch = torch.randn(4, 3, 128, 128)

    def peak(model: Any) -> int:
        return peak_memory(lambda: model(batch), batch.device)

    peak(model)  # what a first forward allocates for good
    assert peak(skipat_surgery.apply(copy.deepcopy(model), [2, 3], phi)) <= peak(model)
