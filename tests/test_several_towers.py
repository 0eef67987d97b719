"""A model that holds several vision transformers: each is cut by its path, and all are saved, loaded and restored."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from small_models import SHAPE, TEXT
from torch import Tensor, nn

import skipat_surgery
from skipat_surgery import PhiConfig, SkipatConfig
from skipat_surgery.commands import report as report_command
from skipat_surgery.core.finding import UnsupportedModelError

IMAGES, VIDEOS = "model.image_tower", "model.video_tower"


def video_llava() -> nn.Module:
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(**SHAPE)
    text = transformers.LlamaConfig(**{**TEXT, "num_hidden_layers": 2}, num_key_value_heads=4)
    config = transformers.VideoLlavaConfig(
        vision_config=vision, text_config=text, image_token_index=40, video_token_index=41, image_seq_length=16
    )
    return transformers.VideoLlavaForConditionalGeneration(config).eval()


def of_both(model: nn.Module) -> Tensor:
    """What the language model makes of a picture and a video of eight frames."""
    draws = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, 32, 32, generator=draws)
    video = torch.randn(1, 8, 3, 32, 32, generator=draws)
    ids = torch.tensor([[3, *[40] * 16, *[41] * 17 * 8, 5]])
    with torch.no_grad():
        return model(input_ids=ids, pixel_values_images=image, pixel_values_videos=video).logits


def depth_pro() -> nn.Module:
    torch.manual_seed(0)
    tower = {"model_type": "dinov2", **SHAPE, "mlp_ratio": 2}
    config = transformers.DepthProConfig(
        fusion_hidden_size=16,
        patch_size=32,
        patch_model_config=tower,
        image_model_config=tower,
        fov_model_config=tower,
        use_fov_model=True,
        num_fov_head_layers=2,
        intermediate_hook_ids=[5, 2],
        intermediate_feature_dims=[16, 16],
        scaled_images_ratios=[0.25, 0.5, 1],
        scaled_images_overlap_ratios=[0.0, 0.5, 0.25],
        scaled_images_feature_dims=[16, 16, 16],
        merge_padding_value=1,
    )
    return transformers.DepthProForDepthEstimation(config).eval()


def of_a_picture(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))).predicted_depth


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor], tuple[str, str]]] = {
    "Video-LLaVA": (video_llava, of_both, (IMAGES, VIDEOS)),
    "Depth Pro": (depth_pro, of_a_picture, ("depth_pro.encoder.patch_encoder", "depth_pro.encoder.image_encoder")),
}
every_model = pytest.mark.parametrize("name", MODELS)


def cut_twice(name: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    build, outputs, (first, second) = MODELS[name]
    model = skipat_surgery.apply(build(), range(2, 4), tower=first)
    return skipat_surgery.apply(model, [1, 4], PhiConfig.paper(), tower=second), outputs


@every_model
def test_each_tower_is_cut_by_its_path(name: str) -> None:
    build, outputs, (first, second) = MODELS[name]
    stock = build()
    expected = outputs(stock)
    cut = skipat_surgery.apply(copy.deepcopy(stock), range(2, 4), tower=first)
    once = outputs(cut)
    assert not torch.equal(once, expected)
    skipat_surgery.apply(cut, [1, 4], PhiConfig.paper(), tower=second)
    assert not torch.equal(outputs(cut), once)
    config = SkipatConfig.from_dict(cut.config.skipat)
    assert [part.skip for part in config.towers] == [(2, 3), (1, 4)]
    assert [part.tower.startswith(path) for part, path in zip(config.towers, (first, second), strict=True)] == [
        True
    ] * 2
    skipat_surgery.restore(cut)
    assert type(cut) is type(stock)
    torch.testing.assert_close(outputs(cut), expected, atol=0, rtol=0)


def test_a_tower_that_is_not_named_or_not_there_is_refused_before_anything_changed() -> None:
    model = video_llava()
    expected = of_both(model)
    for wrong in (None, "model.language_model", "model", "model.image"):
        with pytest.raises(UnsupportedModelError, match=r"holds several .*Name the one to cut, such as tower="):
            skipat_surgery.apply(model, [2], tower=wrong)
    skipat_surgery.apply(model, [2], tower=IMAGES)
    with pytest.raises(ValueError, match="already cut"):
        skipat_surgery.apply(model, [3], tower=IMAGES)
    with pytest.raises(ValueError, match="skip names"):
        skipat_surgery.apply(model, [30], tower=VIDEOS)
    skipat_surgery.restore(model)
    torch.testing.assert_close(of_both(model), expected, atol=0, rtol=0)


@every_model
def test_the_report_shows_every_tower(name: str) -> None:
    model, _ = cut_twice(name)
    assert [len([block for block in tower.blocks if block.phi]) for tower in skipat_surgery.report(model).towers] == [
        2,
        2,
    ]


def test_what_can_be_cut_is_said_of_every_tower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video_llava().save_pretrained(tmp_path / "model")
    report_command.main([str(tmp_path / "model")])
    printed = capsys.readouterr().out
    assert printed.count("what can be cut") == 2
    assert "with one of tower='model.video_tower" in printed


@every_model
def test_a_saved_model_has_all_cuts(name: str, tmp_path: Path) -> None:
    model, outputs = cut_twice(name)
    expected = outputs(model)
    model.save_pretrained(tmp_path / "cut")
    loaded = type(model).from_pretrained(tmp_path / "cut")
    torch.testing.assert_close(outputs(loaded), expected, atol=0, rtol=0)


@pytest.mark.parametrize("how", ["import skipat_surgery", "remote"])
@every_model
def test_in_a_new_process_too(name: str, how: str, tmp_path: Path) -> None:
    model, outputs = cut_twice(name)
    model.save_pretrained(tmp_path / "cut")
    torch.save(outputs(model), tmp_path / "expected.pt")
    loader = "AutoModelForDepthEstimation" if name == "Depth Pro" else "AutoModelForImageTextToText"
    script = f"""
import sys; sys.path[:0] = {sys.path!r}
{"" if how == "remote" else how}
import torch, transformers
torch.set_num_threads({torch.get_num_threads()})  # sums are parted by them
model = transformers.{loader}.from_pretrained({str(tmp_path / "cut")!r}, trust_remote_code={how == "remote"})
from test_several_towers import MODELS
torch.testing.assert_close(
    MODELS[{name!r}][1](model), torch.load({str(tmp_path / "expected.pt")!r}), atol=0, rtol=0)
"""
    subprocess.run([sys.executable, "-c", script], check=True, stdin=subprocess.DEVNULL)


def test_a_model_of_your_own_is_saved_with_all_cuts(tmp_path: Path) -> None:
    def pair() -> nn.ModuleDict:
        towers = [transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SHAPE)) for _ in range(2)]
        return nn.ModuleDict(dict(zip(("left", "right"), towers, strict=True))).eval()

    def outputs(model: nn.ModuleDict) -> list[Tensor]:
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return [tower(pixels).last_hidden_state for tower in model.values()]

    model = skipat_surgery.apply(pair(), [2, 3], tower="left")
    skipat_surgery.apply(model, [4], tower="right")
    skipat_surgery.save(model, tmp_path / "pair")
    loaded = skipat_surgery.load(tmp_path / "pair", pair())
    for mine, theirs in zip(outputs(loaded), outputs(model), strict=True):
        torch.testing.assert_close(mine, theirs, atol=0, rtol=0)


def test_one_tower_is_solved_alone() -> None:
    teacher = video_llava()
    student = skipat_surgery.apply(copy.deepcopy(teacher), [2, 3], tower=IMAGES)
    batches = [torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    parts = student.get_submodule(IMAGES), teacher.get_submodule(IMAGES)
    assert sorted(skipat_surgery.solve(*parts, batches, progress=False).patches) == [2, 3]
    assert student.config.skipat["phi"].keys() == {"2", "3"}
