"""A cut model's checkpoint is an ordinary one, and loading it is strict. (That every family loads: the contract.)"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import transformers
from cases import case_named
from models import cut_of
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import SHAPE
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, ViTForImageClassification, ViTModel

import skipat_surgery
from skipat_surgery import PhiConfig
from skipat_surgery.core import modeling

CASE = case_named("ViTForImageClassification")


@pytest.fixture
def cut():
    return cut_of(CASE.model()).float()


@pytest.fixture
def folder(cut, tmp_path) -> Path:
    cut.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def images():
    return CASE.images().float()


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["skipat"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def test_models_that_were_built_from_one_configuration(tmp_path):
    """Cutting one leaves the other as it is, which is saved as the stock model that it is, and can be cut as well."""
    config = transformers.ViTConfig(**SHAPE)
    one, other = ViTForImageClassification(config), ViTForImageClassification(config)
    skipat_surgery.apply(one, [2, 3])
    assert type(config) is transformers.ViTConfig
    assert not hasattr(config, "skipat")
    assert {id(module.config) for module in one.modules() if hasattr(module, "config")} == {id(one.config)}
    other.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "vit"
    skipat_surgery.apply(other, [4])
    assert (one.config.skipat["phi"].keys(), other.config.skipat["phi"].keys()) == ({"2", "3"}, {"4"})


def test_sharded(cut, images, tmp_path):
    cut.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(images).logits, cut(images).logits)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"low_cpu_mem_usage": True},
        {"attn_implementation": "eager"},
    ],
    ids=str,
)
def test_options_of_from_pretrained(cut, folder, images, options):
    loaded = AutoModelForImageClassification.from_pretrained(folder, **options)
    dtype = options.get("dtype", torch.float32)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    found, expected = loaded(images.to(dtype)).logits, cut.to(dtype)(images.to(dtype)).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_bare_model_of_a_heads_checkpoint(cut, folder, images):
    loaded = AutoModel.from_pretrained(folder)
    assert type(loaded).__name__ == "SkipatViTModel"
    torch.testing.assert_close(loaded(images).last_hidden_state, cut.vit(images).last_hidden_state)


def test_a_new_head_on_a_cut_model(folder):
    loaded = AutoModelForImageClassification.from_pretrained(folder, num_labels=7, ignore_mismatched_sizes=True)
    assert loaded.classifier.out_features == 7


def test_pipeline(cut, folder, tmp_path):
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    image = Image.effect_noise((40, 40), 80).convert("RGB")
    classify = transformers.pipeline("image-classification", model=str(folder))
    found = {row["label"]: row["score"] for row in classify(image)}
    pixels = classify.image_processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = cut(pixels).logits.softmax(dim=-1)[0]
    for label, score in found.items():
        assert score == pytest.approx(float(expected[cut.config.label2id[label]]), abs=1e-5)


def test_a_stock_checkpoint_in_a_cut_class_has_a_fresh_phi_and_says_so(tmp_path, caplog, monkeypatch):
    stock = CASE.model().float()
    stock.save_pretrained(tmp_path)
    config = modeling.SkipatViTConfig.from_pretrained(tmp_path)
    config.skipat = skipat_surgery.SkipatConfig.parse([2, 3], PhiConfig(prefix="mix")).to_dict()
    monkeypatch.setattr(transformers.utils.logging.get_logger("transformers"), "propagate", True)
    monkeypatch.setattr(transformers.utils.logging.get_logger("skipat_surgery"), "propagate", True)
    loaded = modeling.SkipatViTForImageClassification.from_pretrained(tmp_path, config=config)
    assert "the Φ of blocks [2, 3] are fresh" in caplog.text
    torch.manual_seed(0)
    fresh = skipat_surgery.Phi(32, 1, PhiConfig(prefix="mix"))
    for index in (2, 3):
        phi = loaded.vit.layers[index].phi
        torch.testing.assert_close(phi.mix.weight, fresh.mix.weight)  # passes the prefix through
        torch.testing.assert_close(phi.expand.bias, fresh.expand.bias)
        gram = phi.expand.weight @ phi.expand.weight.T  # random, orthogonal
        torch.testing.assert_close(gram, torch.eye(len(gram)) * gram[0, 0], atol=1e-5, rtol=0)
    assert torch.equal(loaded.vit.layers[1].attention.q_proj.weight, stock.vit.layers[1].attention.q_proj.weight)


PHI = "vit.encoder.layer.2.phi.expand.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda weights: weights.pop(PHI), r"missing_keys.*vit.layers.2.phi.expand.weight"),
        (lambda weights: weights.update({PHI[:-6] + "extra": torch.ones(1)}), r"unexpected_keys.*phi.expand.extra"),
        (lambda weights: weights.update({PHI: torch.ones(3, 32)}), r"phi.expand.weight"),
    ],
    ids=["missing", "extra", "misshapen"],
)
def test_a_phi_tensor_that_does_not_fit_is_an_error(folder, change, match):
    edit_weights(folder, change)
    with pytest.raises((ValueError, RuntimeError), match=match):
        AutoModelForImageClassification.from_pretrained(folder)
    with pytest.raises((ValueError, RuntimeError), match=match):
        AutoModelForImageClassification.from_pretrained(folder, ignore_mismatched_sizes=True)


def test_a_truncated_file_is_an_error(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(Exception, match=r"incomplete metadata, file not fully covered"):
        AutoModelForImageClassification.from_pretrained(folder)


def test_a_newer_version_is_an_error(folder):
    edit_config(folder, version=4)
    with pytest.raises(ValueError, match=r"is of version 4, this library reads up to 3: upgrade skipat-surgery"):
        AutoModelForImageClassification.from_pretrained(folder)


@pytest.mark.parametrize("skip", [["2"], ["2", "3", "4", "5"], ["1", "3", "5"]], ids=str)
def test_a_skip_that_contradicts_the_weights_is_an_error(folder, skip):
    phi = json.loads((folder / "config.json").read_text())["skipat"]["phi"]["2"]
    edit_config(folder, phi=dict.fromkeys(skip, phi))
    with pytest.raises(ValueError, match=r"does not hold the blocks that the config.skipat of Skipat.* describes"):
        AutoModelForImageClassification.from_pretrained(folder)


def test_a_config_without_skipat_is_an_error(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["skipat"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="not a skipat configuration"):
        AutoModelForImageClassification.from_pretrained(folder)


def test_a_class_of_the_users_own_is_cut_and_its_save_names_the_way(tmp_path, images):
    class Mine(transformers.PreTrainedModel):
        config_class = transformers.ViTConfig

        def __init__(self, config):
            super().__init__(config)
            self.vit = ViTModel(config)
            self.post_init()

        def forward(self, pixel_values):
            return self.vit(pixel_values).pooler_output

    model = Mine(transformers.ViTConfig(**SHAPE))
    before = model(images)
    skipat_surgery.apply(model, [2, 3])
    model(images)
    with pytest.raises(NotImplementedError, match=r"Mine is not a class that .*Use skipat_surgery.save"):
        model.save_pretrained(tmp_path)
    skipat_surgery.restore(model)
    assert type(model) is Mine
    assert torch.equal(model(images), before)
    model.save_pretrained(tmp_path)


def test_restoring_gives_a_stock_checkpoint(cut, tmp_path):
    stock = CASE.model()
    skipat_surgery.restore(skipat_surgery.apply(stock, [2])).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "vit"
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path)) is ViTForImageClassification
    assert not list(tmp_path.glob("*.py"))


def test_the_stock_class_refuses_until_the_model_is_restored(tmp_path):
    stock = CASE.model()
    asked = {"patch_embeddings": True}
    stock.config.fusion_config = asked
    skipat_surgery.apply(stock, [2]).save_pretrained(tmp_path / "cut")
    with pytest.raises(ValueError, match="this model is cut by Skip-Attention"):
        ViTForImageClassification.from_pretrained(tmp_path / "cut", attn_implementation="eager")
    with pytest.raises(ValueError, match="this model is cut by Skip-Attention"):
        ViTModel.from_pretrained(tmp_path / "cut")
    skipat_surgery.restore(stock)
    assert stock.config.fusion_config == asked
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "cut")
    again.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="this model is cut by Skip-Attention"):
        ViTForImageClassification.from_pretrained(tmp_path / "again")


@torch.no_grad()
def test_timm_models_save_themselves(tmp_path):
    case = case_named("timm vit")
    cut, images = cut_of(case.model()).float(), case.images().float()
    cut.save_pretrained(tmp_path)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(images), cut(images))
    wrapper = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(wrapper.eval()(images).logits, cut(images))
    card = (tmp_path / "README.md").read_text()
    assert "`vit_tiny_patch16_224`" in card
    assert "base_model:" not in card  # timm does not say whether the weights are the pretrained ones
    again = tmp_path / "again"
    timm.create_model(f"local-dir:{tmp_path}", pretrained=True).save_pretrained(again)
    assert torch.equal(timm.create_model(f"local-dir:{again}", pretrained=True).eval()(images), cut(images))


def test_timm_loading_is_strict(tmp_path):
    cut = cut_of(case_named("timm vit").model()).float()
    cut.save_pretrained(tmp_path)
    whole = copy.copy(load_file(tmp_path / "model.safetensors"))
    for wrong in ("missing", "extra"):
        weights = dict(whole)
        if wrong == "missing":
            del weights["blocks.2.phi.expand.weight"]
        else:
            weights["blocks.2.phi.extra"] = torch.ones(1)
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(RuntimeError, match=r"blocks.2.phi"):
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_the_card_says_where_it_comes_from(tmp_path):
    CASE.model().save_pretrained(tmp_path / "vit-tiny-stock")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "vit-tiny-stock")
    skipat_surgery.apply(model, [2, 3]).save_pretrained(tmp_path / "cut")
    card = (tmp_path / "cut" / "README.md").read_text()
    assert "# vit-tiny-stock with Skip-Attention" in card
    assert "trust_remote_code=True" in card
    (tmp_path / "cut" / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "cut")
    assert (tmp_path / "cut" / "README.md").read_text() == "mine"
    shutil.rmtree(tmp_path / "cut")
