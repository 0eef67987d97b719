"""`save` and `load`: a cut model of any class comes back to the bit, in a model that the user builds."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from cases import case_named
from models import assert_same, cut_of
from safetensors.torch import load_file, save_file
from small_models import SHAPE, hf
from test_hub import Hub, run
from torch import Tensor, nn

import skipat_surgery
from skipat_surgery import PhiConfig, saved_files

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Saliency(nn.Module):
    """A model of one's own: a tower, and a decoder that has buffers too."""

    def __init__(self, **shape: int) -> None:
        super().__init__()
        config = transformers.Dinov2Config(**{**SHAPE, **shape})
        self.tower = transformers.Dinov2Model(config)
        self.norm = nn.BatchNorm2d(config.hidden_size)
        self.head = nn.Conv2d(config.hidden_size, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.tower(images).last_hidden_state[:, 1:]
        return self.head(self.norm(tokens.transpose(1, 2).unflatten(2, (4, 4))))


def built(seed: int = 0, **shape: int) -> Saliency:
    torch.manual_seed(seed)
    return Saliency(**shape).eval()


@pytest.fixture(scope="module")
def student() -> Saliency:
    model = skipat_surgery.apply(built(), [2, 3, 5])
    skipat_surgery.distill(model, built(), [IMAGES], steps=3, progress=False)
    return model.eval()


@pytest.fixture
def distilled(student: Saliency) -> Saliency:
    """A student after a few steps. Its decoder is not trained."""
    return copy.deepcopy(student)


def written(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "skipat.safetensors")


@torch.no_grad()
def check_equal(loaded: nn.Module, saved: nn.Module, call: Callable[[nn.Module], list[Tensor]]) -> None:
    """Every weight, its dtype, the classes and the outputs are the same to the bit."""
    assert_same(dict(loaded.state_dict()), dict(saved.state_dict()), atol=0, rtol=0)
    assert [type(module) for module in loaded.modules()] == [type(module) for module in saved.modules()]
    assert skipat_surgery.report(loaded) == skipat_surgery.report(saved)
    assert_same(call(loaded), call(saved), atol=0, rtol=0)


def maps(model: nn.Module) -> list[Tensor]:
    return [model(IMAGES.to(model.head.weight.dtype))]


# ---------------------------------------------------------------------------------------------------- what comes back


def test_a_model_of_ones_own_comes_back_in_one_of_other_weights(distilled, tmp_path):
    skipat_surgery.save(distilled, tmp_path / "cut")
    fresh = built(seed=1)
    assert skipat_surgery.load(tmp_path / "cut", fresh) is fresh
    check_equal(fresh, distilled, maps)
    with pytest.raises(ValueError, match="loaded from a cut checkpoint"):
        skipat_surgery.restore(fresh)


def test_with_a_base_what_it_has_itself_is_not_written(distilled, tmp_path):
    skipat_surgery.save(distilled, tmp_path, base=built())
    base, state = built().state_dict(), distilled.state_dict()
    changed = {name for name in state if name not in base or not torch.equal(state[name], base[name])}
    assert written(tmp_path).keys() == changed
    assert {name for name in state if ".phi." in name} < changed
    assert not any(name.startswith(("head.", "norm.", "tower.embeddings.")) for name in changed)
    check_equal(skipat_surgery.load(tmp_path, built()), distilled, maps)


def test_a_weight_before_the_cut_that_was_trained_is_written(tmp_path):
    cut = skipat_surgery.apply(built(), [4])
    with torch.no_grad():
        cut.tower.embeddings.cls_token[..., 0] += 1
        cut.norm.bias.neg_()  # zeros still, but not to the bit
    skipat_surgery.save(cut, tmp_path, base=built())
    assert {name for name in written(tmp_path) if ".phi." not in name} == {"tower.embeddings.cls_token", "norm.bias"}
    loaded = skipat_surgery.load(tmp_path, built())
    check_equal(loaded, cut, maps)
    assert loaded.norm.bias.signbit().all()


@pytest.mark.parametrize("name", ["ViTForImageClassification", "CLIPModel", "TimmWrapperModel", "timm vit"])
def test_models_of_transformers_and_timm_come_back_and_save_themselves(name, tmp_path):
    case = case_named(name)
    cut = cut_of(case.model()).float()
    skipat_surgery.save(cut, tmp_path / "ours")
    loaded = skipat_surgery.load(tmp_path / "ours", case.build().eval())
    check_equal(loaded, cut, lambda model: case.tensors(model, case.images().float()))
    for model, folder in ((loaded, "loaded"), (cut, "cut")):
        model.save_pretrained(tmp_path / folder)
    assert_same(load_file(tmp_path / "loaded/model.safetensors"), load_file(tmp_path / "cut/model.safetensors"))
    assert (tmp_path / "loaded/config.json").read_text() == (tmp_path / "cut/config.json").read_text()


def test_a_class_of_ones_own_that_cannot_save_itself(tmp_path):
    class Mine(transformers.ViTForImageClassification):
        pass

    config = transformers.ViTConfig(**SHAPE)
    cut = skipat_surgery.apply(Mine(config).eval(), [2])
    with pytest.raises(NotImplementedError, match=r"Use skipat_surgery\.save\(model, directory\)"):
        cut.save_pretrained(tmp_path)
    skipat_surgery.save(cut, tmp_path)
    check_equal(skipat_surgery.load(tmp_path, Mine(config).eval()), cut, lambda model: [model(IMAGES).logits])


def test_bfloat16_stays_what_it_is(distilled, tmp_path):
    cut = distilled.bfloat16()
    skipat_surgery.save(cut, tmp_path / "whole")
    skipat_surgery.save(cut, tmp_path / "changed", base=built().bfloat16())
    assert {weight.dtype for weight in written(tmp_path / "changed").values()} == {torch.bfloat16}
    for folder, seed in (("whole", 1), ("changed", 0)):
        check_equal(skipat_surgery.load(tmp_path / folder, built(seed).bfloat16()), cut, maps)


def test_phi_may_have_been_trained_in_another_dtype_than_the_model(tmp_path):
    cut = skipat_surgery.apply(built().bfloat16(), [2])
    cut.tower.encoder.layer[2].phi.float()

    def call(model: nn.Module) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return maps(model)

    skipat_surgery.save(cut, tmp_path)
    check_equal(skipat_surgery.load(tmp_path, built().bfloat16()), cut, call)


def test_what_was_taken_out_is_not_written_and_can_still_be_put_back(tmp_path):
    kept = skipat_surgery.apply(built(), [2, 3], PhiConfig.paper())
    skipat_surgery.save(kept, tmp_path / "kept")
    lean = skipat_surgery.apply(built(seed=1), [2, 3], PhiConfig.paper(), keep_removed=False)
    lean.load_state_dict(kept.state_dict())
    skipat_surgery.save(lean, tmp_path / "lean")
    assert_same(written(tmp_path / "lean"), written(tmp_path / "kept"), atol=0, rtol=0)
    assert (tmp_path / "lean/skipat.json").read_text() == (tmp_path / "kept/skipat.json").read_text()
    removed = built().state_dict().keys() - kept.state_dict().keys()
    assert removed
    assert not removed & written(tmp_path / "kept").keys()
    assert_same(dict(skipat_surgery.restore(kept).state_dict()), dict(built().state_dict()), atol=0, rtol=0)


def test_weights_that_names_share_are_written_once_and_stay_shared(tmp_path):
    def tied(seed: int) -> Saliency:
        model = built(seed)
        model.again = model.head
        model.last = nn.Conv2d(32, 1, 1)
        model.last.weight = model.head.weight
        return model

    cut = skipat_surgery.apply(tied(0), [2])
    skipat_surgery.save(cut, tmp_path)
    assert len({"head.weight", "again.weight", "last.weight"} & written(tmp_path).keys()) == 1
    loaded = skipat_surgery.load(tmp_path, tied(1))
    check_equal(loaded, cut, maps)
    assert loaded.last.weight is loaded.head.weight


def two() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"first": hf("ViTForImageClassification", "ViTConfig")(), "second": built()}).eval()


def test_of_two_towers_each_that_is_cut_comes_back(tmp_path):
    def call(model: nn.ModuleDict) -> list[Tensor]:
        return [model["first"](IMAGES).logits, model["second"](IMAGES)]

    cut = two()
    for part, skip in (("second", [3]), ("first", [2])):
        skipat_surgery.apply(cut[part], skip)
        skipat_surgery.save(cut, tmp_path / part)
        check_equal(skipat_surgery.load(tmp_path / part, two()), cut, call)


def test_a_tower_that_was_cut_by_itself_can_save_itself_again(tmp_path):
    cut = built()
    skipat_surgery.apply(cut.tower, [2])
    skipat_surgery.save(cut, tmp_path / "whole")
    loaded = skipat_surgery.load(tmp_path / "whole", built(seed=1))
    check_equal(loaded, cut, maps)
    loaded.tower.save_pretrained(tmp_path / "tower")
    again = transformers.AutoModel.from_pretrained(tmp_path / "tower")
    assert_same(dict(again.state_dict()), dict(cut.tower.state_dict()), atol=0, rtol=0)


def test_the_device_the_mode_and_what_is_trained_are_the_models_own(distilled, tmp_path):
    skipat_surgery.save(distilled, tmp_path)
    mine = built(seed=1).train()
    mine.head.requires_grad_(False)
    loaded = skipat_surgery.load(tmp_path, mine)
    assert all(module.training for module in loaded.modules())
    assert {name for name, p in loaded.named_parameters() if not p.requires_grad} == {"head.weight", "head.bias"}


HUB = """
import torch, skipat_surgery
from test_saving import IMAGES, built
cut = skipat_surgery.apply(built(), [2])
skipat_surgery.save(cut, "{folder}", base=built(), push_to_hub="founder/mine", commit_message="Mine", private=True)
loaded = skipat_surgery.load("founder/mine", built())
assert torch.equal(loaded(IMAGES), cut(IMAGES))
try:
    skipat_surgery.load("founder/nothing", built())
except FileNotFoundError as error:
    print(error)
"""


def test_it_is_pushed_and_loaded_by_id(tmp_path):
    with Hub() as hub:
        said = run(hub, HUB.format(folder=tmp_path / "cut"), tmp_path / "home")
        assert hub.commits["founder/mine"] == ["initial commit", "Mine"]
        assert hub.repos["founder/mine"].keys() == {"skipat.json", "skipat.safetensors"}
        for name, content in hub.repos["founder/mine"].items():
            assert (tmp_path / "cut" / name).read_bytes() == content
    assert "founder/nothing is no folder, and no repository of the Hub that could be read" in said


# ---------------------------------------------------------------------------------------------------- what is refused


@torch.no_grad()
def refuse(folder: Path, model: nn.Module, match: str, error: type[Exception] = ValueError) -> None:
    """Loading must raise this, and leave every weight, class and attribute of the model as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = [(type(module), sorted(vars(module))) for module in model.modules()]
    parameters = [id(parameter) for parameter in model.parameters()]
    with pytest.raises(error, match=match):
        skipat_surgery.load(folder, model)
    assert_same(dict(model.state_dict()), before, atol=0, rtol=0)
    assert [(type(module), sorted(vars(module))) for module in model.modules()] == seen
    assert [id(parameter) for parameter in model.parameters()] == parameters


def with_more() -> nn.Module:
    model = built()
    model.more = nn.Linear(2, 2)
    return model


def with_other_family() -> nn.Module:
    model = built()
    model.tower = hf("ViTModel", "ViTConfig")()
    return model


OTHERS = {
    "no tower there": (lambda: nn.ModuleDict({"backbone": built().tower}), "at tower, where this ModuleDict has none"),
    "of another family": (with_other_family, r"of the family .* at tower, where this Saliency has one of ViT"),
    "already cut": (lambda: skipat_surgery.apply(built(), [2, 3, 5]), "already cut; pass an untouched one"),
    "fewer blocks": (lambda: built(num_hidden_layers=4), r"skip names \[5\], but Saliency has 4 blocks"),
    "more blocks": (lambda: built(num_hidden_layers=7), r"missing: tower\.encoder\.layer\.6\.\S+, .* and \d+ more"),
    "wider": (
        lambda: built(hidden_size=64),
        r"of another shape \(saved, here\): head\.weight \(\(1, 32, 1, 1\), \(1, 64, 1, 1\)\)",
    ),
    "with a weight more": (with_more, r"missing: more\.bias, more\.weight"),
    "in another dtype": (lambda: built().bfloat16(), r"of another dtype \(saved, here\): .*float32, torch\.bfloat16"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_model_is_refused_and_stays_as_it_was(other, distilled, tmp_path):
    build, match = OTHERS[other]
    skipat_surgery.save(distilled, tmp_path)
    refuse(tmp_path, build(), match)


def test_a_wrapped_model_is_refused(distilled, tmp_path):
    skipat_surgery.save(distilled, tmp_path)
    with pytest.raises(skipat_surgery.UnsupportedModelError, match="compiled"):
        skipat_surgery.load(tmp_path, torch.compile(built()))


@pytest.mark.parametrize("model", [lambda: built(seed=1), lambda: built().bfloat16()])
def test_a_model_without_the_weights_that_were_not_written_is_refused(model, distilled, tmp_path):
    skipat_surgery.save(distilled, tmp_path, base=built())
    refuse(tmp_path, model(), r"some are others, or of another dtype: head\.bias, .*Load the base's weights first")


def damage_json(**changes: object) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        held = json.loads((folder / "skipat.json").read_text())
        (folder / "skipat.json").write_text(json.dumps({**held, **changes}))

    return damage


def damage_weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        weights = written(folder)
        change(weights)
        save_file(weights, folder / "skipat.safetensors")

    return damage


def newer_phis(folder: Path) -> None:
    held = json.loads((folder / "skipat.json").read_text())
    held["towers"][0]["skipat"]["version"] = 99
    (folder / "skipat.json").write_text(json.dumps(held))


def truncate(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9])


DAMAGES = {
    "no configuration": (lambda folder: (folder / "skipat.json").unlink(), r"holds no skipat\.json", FileNotFoundError),
    "no weights": (
        lambda folder: (folder / "skipat.safetensors").unlink(),
        r"holds no skipat\.safetensors",
        FileNotFoundError,
    ),
    "half a configuration": (truncate("skipat.json"), r"skipat\.json cannot be read: JSONDecodeError", ValueError),
    "half the weights": (truncate("skipat.safetensors"), r"skipat\.safetensors is damaged", ValueError),
    "of a newer version": (
        damage_json(version=2),
        r"skipat\.json cannot be read.*it is of version 2, this library reads up to 1: upgrade",
        ValueError,
    ),
    "with newer Φ's": (newer_phis, r"is of version 99, this library reads up to \d: upgrade", ValueError),
    "no towers": (damage_json(towers=[]), r"skipat\.json cannot be read: ValueError: it names no tower", ValueError),
    "other towers": (damage_json(towers=[{"path": 3}]), r"skipat\.json cannot be read: KeyError", ValueError),
    "no mapping": (damage_json(unwritten=[1]), r"skipat\.json cannot be read: TypeError", ValueError),
    "a weight is missing": (
        damage_weights(lambda weights: weights.pop("head.bias")),
        r"do not fit\. missing: head\.bias\.",
        ValueError,
    ),
    "a weight too many": (
        damage_weights(lambda weights: weights.update({"tower.extra": torch.ones(1)})),
        r"left over: tower\.extra\.",
        ValueError,
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_named_and_nothing_is_changed(name, distilled, tmp_path):
    damage, match, error = DAMAGES[name]
    skipat_surgery.save(distilled, tmp_path)
    damage(tmp_path)
    refuse(tmp_path, built(), match, error)


def test_a_standard_checkpoint_is_told_from_these_files(tmp_path):
    cut_of(case_named("ViTForImageClassification").model()).save_pretrained(tmp_path)
    refuse(tmp_path, built(), "load it with from_pretrained", FileNotFoundError)


@pytest.mark.parametrize(
    ("model", "options", "error", "match"),
    [
        (built, {}, ValueError, "Saliency is not cut"),
        (lambda: cut_of(built()), {"base": cut_of(built())}, ValueError, "base is cut; it must be the untouched"),
        (lambda: torch.compile(cut_of(built())), {}, ValueError, r"takes the plain model.*model\._orig_mod"),
        (lambda: cut_of(built()), {"private": True}, TypeError, r"got \['private'\]; with push_to_hub="),
        (lambda: cut_of(built()), {"push_to_hub": "a/b", "tags": ["x"]}, TypeError, r"got \['tags'\]"),
    ],
)
def test_what_cannot_be_saved_writes_nothing(model, options, error, match, tmp_path):
    with pytest.raises(error, match=match):
        skipat_surgery.save(model(), tmp_path / "cut", **options)
    assert not (tmp_path / "cut").exists()


def test_a_save_that_fails_leaves_the_earlier_one(distilled, tmp_path, monkeypatch):
    skipat_surgery.save(distilled, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(weights: object, folder: str, **kwargs: object) -> None:
        Path(folder, "skipat.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(saved_files, "save_torch_state_dict", fail)
    with pytest.raises(OSError, match="no space left"):
        skipat_surgery.save(skipat_surgery.apply(built(), [4]), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
