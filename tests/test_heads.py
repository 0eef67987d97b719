"""Models of every head: which are compared by their classes, and what becomes of the others in the recipe."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import small_models as make
import torch
from cases import CASES, Case, case_named
from models import cut_of
from peft import LoraConfig, get_peft_model
from runs import recipe
from transformers import ViTImageProcessor

import skipat_surgery
from skipat_surgery.commands import distill, loading
from skipat_surgery.commands.reload import outputs
from skipat_surgery.commands.results import plot
from skipat_surgery.convert.evaluation import Evaluator
from skipat_surgery.measure.benchmark import LIMIT, UNTOUCHED, benchmark
from skipat_surgery.measure.line_up import line_up
from skipat_surgery.observing import image_part, observe, outputs_of
from skipat_surgery.tasks.classification import Classification
from skipat_surgery.tasks.finding import num_classes_of, task_of
from skipat_surgery.tower import Tower

MULTI_LABEL, REGRESSION, SINGLE_LABEL = "multi_label_classification", "regression", "single_label_classification"


def vit(**config) -> torch.nn.Module:
    return make.hf("ViTForImageClassification", "ViTConfig", **config)()


@pytest.mark.parametrize(
    ("build", "classes"),
    [
        (lambda: vit(num_labels=5), 5),
        (lambda: vit(num_labels=5, problem_type=SINGLE_LABEL), 5),
        (lambda: vit(num_labels=5, problem_type=MULTI_LABEL), None),
        (lambda: vit(num_labels=5, problem_type=REGRESSION), None),
        (lambda: vit(num_labels=1), None),
        (make.timm_model("vit_tiny_patch16_224", num_classes=5), 5),
        (make.timm_model("vit_tiny_patch16_224", num_classes=1), None),
        (make.timm_model("vit_tiny_patch16_224", num_classes=0), None),
        (make.timm_model("vit_tiny_patch16_224", num_classes=5, global_pool=""), None),
    ],
)
def test_only_a_single_label_classifier_has_classes(build, classes):
    assert num_classes_of(build()) == classes
    assert num_classes_of(torch.compile(build())) == classes
    targets = [name for name, _ in build().named_modules() if name.endswith(".2.mlp.fc1")]
    assert num_classes_of(get_peft_model(build(), LoraConfig(target_modules=targets))) == classes


# Those that run on images and nothing else that has a part in them: no padding, and no frames that become images.
# Those whose images have a grid each are in tests/test_ragged.py.
WHOLE = [
    case
    for case in CASES
    if case.given is not make.frames and case.sizes is None and not any("mask" in name for name in case.inputs(2))
]


@pytest.mark.parametrize("case", WHOLE, ids=lambda case: case.name)
@torch.no_grad()
def test_what_is_compared_is_what_the_whole_model_shows(case: Case):
    model, images = case.model(), case.images()
    tower = Tower.of(model)
    with observe(tower, tokens=True) as seen:
        output = case.call(model, images)
    alone = images if case.given is make.listed else next(iter(case.given(images).values()))
    found = outputs_of(model, tower, alone)
    if case.name == "timm vit, features only":  # which leaves the last norm out
        seen.tokens = tower.last_module()(seen.tokens)
    torch.testing.assert_close(found.tokens, tower.of_images(seen.tokens, alone).float())
    if "ForImageClassification" in type(model).__name__ or "ForVideoClassification" in type(model).__name__:
        torch.testing.assert_close(found.logits, output.logits.float())
    elif case.host != "transformers" and isinstance(task_of(model), Classification):
        torch.testing.assert_close(found.logits, output.float())
    else:
        assert found.logits is None


@torch.no_grad()
def test_a_pooled_token_that_passes_the_last_norm_too_is_not_taken_for_the_tokens():
    case = case_named("JanusVisionModel")
    model, images = case.model(), case.images()
    found = outputs_of(model, Tower.of(model), images)
    torch.testing.assert_close(found.tokens, model(images).last_hidden_state.float())


@pytest.mark.parametrize(
    ("build", "own"),
    [
        (lambda: vit(num_labels=1), {"head", "absolute_error"}),
        (lambda: case_named("CLIPModel").build(), {"head", "embedding_cosine"}),
    ],
    ids=["regression", "contrastive"],
)
def test_heads_without_single_label_classes_have_figures_of_their_own(build, own):
    """And none that labels of whole images tell."""
    teacher = build()
    images = torch.randn(2, 3, 32, 32)
    figures = Evaluator(teacher.eval(), labelled=True)(cut_of(teacher).float().eval(), [(images, torch.zeros(2))])
    assert figures.keys() == {"patch_cosine", "prefix_cosine", "images", "corrupt"} | own


def saved(model: torch.nn.Module, folder: Path) -> Path:
    model.float().save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


HEADS = {
    "segmentation": (lambda: case_named("BeitForSemanticSegmentation").model(), "AutoModelForSemanticSegmentation"),
    "detector": (lambda: case_named("YolosForObjectDetection").model(), "AutoModelForObjectDetection"),
    "depth": (lambda: case_named("DPTForDepthEstimation").model(), "AutoModelForDepthEstimation"),
    "contrastive": (lambda: case_named("CLIPModel").model(), "AutoModelForZeroShotImageClassification"),
    "regression": (
        lambda: replace(case_named("ViTForImageClassification"), build=lambda: vit(num_labels=1)).model(),
        "AutoModelForImageClassification",
    ),
    "backbone": (lambda: case_named("Dinov2Backbone").model(), "SkipatDinov2Backbone"),
    "timm's wrapper": (lambda: case_named("TimmWrapperModel").model(), "AutoModel"),
}


@pytest.mark.parametrize("head", HEADS)
def test_the_recipe_distils_every_head(head, tmp_path, monkeypatch, capsys):
    build, loader = HEADS[head]
    given, differences = build().float(), []

    def reloaded(folder: Path, model: torch.nn.Module, images: torch.Tensor) -> float:
        """As `difference_after_reload`, in this process."""
        pairs = zip(outputs(loading.load(str(folder)).model, images), outputs(model, images), strict=True)
        differences.extend(float((mine - theirs).abs().max()) for mine, theirs in pairs)
        return max(differences)

    monkeypatch.setattr(distill, "difference_after_reload", reloaded)
    run = recipe(saved(given, tmp_path / "model"), tmp_path / "run", max_steps=2, eval_steps=2)
    stock = copy.deepcopy(run.original.state_dict())
    run.run()
    task = task_of(given)
    said = "has no head that is known" if task is None else f"is for {task.name}"
    assert f"{type(given).__name__} {said}: distilled and measured by" in " ".join(capsys.readouterr().out.split())
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    rows, best = found["rows"], found["best"]["figures"]
    assert not {"kl", "top1"} & rows["distilled"].keys()
    assert ("head" in rows["distilled"]) == (task is not None)
    if task is None:
        assert rows["distilled"]["patch_cosine"] > rows["cut"]["patch_cosine"]
    else:
        assert best["head"] == min(row["head"] for name, row in rows.items() if name != "teacher")
    assert len(differences) == len(outputs(run.student, torch.randn(2, 3, 32, 32)))
    assert max(differences) < 1e-5
    assert f"{loader}.from_pretrained" in (tmp_path / "run" / "last" / "README.md").read_text()
    assert all(torch.equal(weight, run.original.state_dict()[name]) for name, weight in stock.items())


def test_a_teacher_with_other_tokens_is_refused_where_there_are_no_classes(tmp_path):
    small, large = (
        saved(make.hf("Dinov2Model", "Dinov2Config", image_size=size)(), tmp_path / str(size)) for size in (32, 64)
    )
    with pytest.raises(ValueError, match=r"learns from tokens like its own: it has \(4, 4\).*the teacher \(8, 8\)"):
        recipe(small, tmp_path / "run", teacher=str(large))


@pytest.mark.parametrize(
    ("figures", "drawn"),
    [
        ({"top1": 0.5, "agreement": 0.6, "prefix_cosine": 0.7, "patch_cosine": 0.8}, {"top-1": 50, "agreement": 60}),
        ({"agreement": 0.6, "miou": 0.5, "patch_cosine": 0.8}, {"mIoU": 50, "agreement": 60}),
        ({"map_correlation": 0.9, "patch_cosine": 0.8}, {"map correlation": 90, "patch cosine": 80}),
        ({"prefix_cosine": 0.7, "patch_cosine": 0.8}, {"CLS cosine": 70, "patch cosine": 80}),
        ({"patch_cosine": 0.8}, {"patch cosine": 80}),
    ],
)
def test_the_course_is_drawn_in_the_figures_that_there_are(figures, drawn, tmp_path, monkeypatch):
    lines = {}

    def keep(axes, *args, label="", **kwargs):
        lines[label.removesuffix(" with the untouched model")] = args[1]

    monkeypatch.setattr("matplotlib.axes.Axes.plot", keep)
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda axes: None)
    history = [{"step": 1, "seconds": 60.0, "loss": 1.0, **figures}]
    plot({"history": history, "rows": {"teacher": {}, "cut": figures}}, tmp_path / "curve.png")
    assert {label: values[0] for label, values in lines.items() if label} == {
        k: pytest.approx(v) for k, v in drawn.items()
    }
    assert (tmp_path / "curve.png").stat().st_size


def test_a_model_that_takes_text_is_measured_by_its_tower():
    model, images = case_named("CLIPModel").model(), case_named("CLIPModel").images()
    rivals = line_up(model, [2, 3], {"cut": skipat_surgery.PhiConfig()})
    found = benchmark(rivals, images, rounds=2, progress=False)
    assert [row.name for row in found.rows] == [UNTOUCHED, "cut", LIMIT]
    assert image_part(model) is model.vision_model


BUILDABLE = [
    case for case in CASES if case.host == "transformers" and case.given is not make.spectrograms and case.sizes is None
]


@pytest.mark.parametrize("case", BUILDABLE, ids=lambda case: case.name)
@torch.no_grad()
def test_a_model_is_built_for_another_image_size(case: Case, tmp_path):
    case.build().save_pretrained(tmp_path)
    built = loading.build(str(tmp_path), 64)
    tower = Tower.of(built)
    shape, grids = tower.family.image_size(tower.module), case.grids(torch.empty(1, 3, 64, 64))
    patches = math.prod(grids[-1] if grids else (64 // case.sides[-1],) * 2)
    assert shape[-3:] == (3, 64, 64)
    if len(shape) == 4:
        patches *= shape[0] // case.sides[0]
    late = built.config.num_queries if tower.family.num_late_blocks(tower.module) else 0  # which join the patches
    found = outputs_of(built, tower, torch.randn(1, *tower.family.shape_of_input(tower.module)))
    assert found.tokens.shape[1] == tower.num_special_tokens + patches + late
