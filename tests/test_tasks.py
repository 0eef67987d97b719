"""What each kind of head gives, how two outputs are compared, and what is measured, by value."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import small_models as make
import torch
from cases import Case, case_named
from models import cut_of
from scipy.special import kl_div, softmax
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchvision.ops import box_convert, box_iou
from transformers import ViTImageProcessor

import skipat_surgery
from skipat_surgery.commands import loading
from skipat_surgery.commands.arguments import Arguments
from skipat_surgery.commands.sources import check_task
from skipat_surgery.convert.evaluation import Evaluator
from skipat_surgery.convert.optimizers import freeze_untouched
from skipat_surgery.convert.sharing import train_mode
from skipat_surgery.observing import Outputs, outputs_of
from skipat_surgery.tasks.classification import Classification, MultiLabel, Regression
from skipat_surgery.tasks.contrastive import Contrastive
from skipat_surgery.tasks.detection import Detection
from skipat_surgery.tasks.embedding import Embedding
from skipat_surgery.tasks.finding import give_task, task_named, task_of
from skipat_surgery.tasks.maps import Depth, Features
from skipat_surgery.tasks.restoration import Restoration
from skipat_surgery.tasks.segmentation import Segmentation, classes_at, classes_of, overlaps
from skipat_surgery.tasks.wrapping import unwrapped
from skipat_surgery.tower import Tower

CLOSE = {"rtol": 1e-6, "atol": 1e-9}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def both() -> tuple[torch.Tensor, torch.Tensor]:
    """What a cut model and its teacher give: (3, 4, 5, 6)."""
    return drawn(3, 4, 5, 6), drawn(3, 4, 5, 6, seed=1)


def compared(task, found, expected):
    return task.distance(found, expected).numpy(), {n: v.numpy() for n, v in task.figures(found, expected).items()}


def test_classification(both):
    mine, theirs = (part.flatten(1) for part in both)
    distance, figures = compared(Classification(), {"logits": mine}, {"logits": theirs})
    p, q = (softmax(part.numpy(), axis=1) for part in (theirs, mine))
    np.testing.assert_allclose(distance, kl_div(p, q).sum(axis=1), **CLOSE)
    np.testing.assert_array_equal(figures["agreement"], p.argmax(axis=1) == q.argmax(axis=1))


def test_multi_label_classification(both):
    mine, theirs = (part[:, :, 0, 0] for part in both)
    distance, figures = compared(MultiLabel(), {"logits": mine}, {"logits": theirs})
    p, q = (1 / (1 + np.exp(-part.numpy())) for part in (theirs, mine))
    np.testing.assert_allclose(distance, (kl_div(p, q) + kl_div(1 - p, 1 - q)).sum(axis=1), **CLOSE)
    np.testing.assert_allclose(figures["agreement"], ((p > 0.5) == (q > 0.5)).mean(axis=1))


def test_regression(both):
    mine, theirs = (part[:, :2, 0, 0] for part in both)
    distance, figures = compared(Regression(), {"logits": mine}, {"logits": theirs})
    error = (mine - theirs).numpy()
    np.testing.assert_allclose(distance, (error**2).mean(axis=1) / (theirs.numpy() ** 2).mean(), **CLOSE)
    np.testing.assert_allclose(figures["absolute_error"], abs(error).mean(axis=1), **CLOSE)


def test_restoration(both):
    mine, theirs = both
    distance, figures = compared(Restoration(), {"picture": mine}, {"picture": theirs})
    squared = ((mine - theirs) ** 2).numpy().reshape(3, -1).mean(axis=1)
    flat = theirs.numpy().reshape(3, -1)
    np.testing.assert_allclose(distance, squared / flat.var(axis=1), **CLOSE)
    peaks = flat.max(axis=1) - flat.min(axis=1)
    expected = [peak_signal_noise_ratio(mine[i], theirs[i], data_range=float(peaks[i])) for i in range(len(mine))]
    np.testing.assert_allclose(figures["psnr"], expected, **CLOSE)
    _, same = compared(Restoration(), {"picture": mine.float()}, {"picture": mine.float()})
    assert np.isfinite(same["psnr"]).all()
    assert (same["psnr"] > 130).all()


def test_segmentation(both):
    mine, theirs = both
    task = Segmentation()
    distance, figures = compared(task, {"logits": mine}, {"logits": theirs})
    p, q = (softmax(part.numpy(), axis=1) for part in (theirs, mine))
    np.testing.assert_allclose(distance, kl_div(p, q).sum(axis=1).mean(axis=(1, 2)), **CLOSE)
    same = p.argmax(axis=1), q.argmax(axis=1)
    np.testing.assert_allclose(figures["agreement"], (same[0] == same[1]).mean(axis=(1, 2)))
    iou = [((same[0] == c) & (same[1] == c)).sum() / ((same[0] == c) | (same[1] == c)).sum() for c in range(4)]
    sums = {name: torch.from_numpy(figures[name]).sum(dim=0) for name in task.sums}
    assert task.of_sums(sums) == {"miou": pytest.approx(np.mean(iou))}


def test_segmentation_with_one_class():
    """A pixel belongs to it where its logit is above 0; what lies outside is the other class."""
    mine, theirs = drawn(2, 1, 5, 6), drawn(2, 1, 5, 6, seed=1)
    distance, figures = compared(Segmentation(), {"logits": mine}, {"logits": theirs})
    p, q = (1 / (1 + np.exp(-part.numpy())) for part in (theirs, mine))
    np.testing.assert_allclose(distance, (kl_div(p, q) + kl_div(1 - p, 1 - q)).mean(axis=(1, 2, 3)), **CLOSE)
    inside = (p > 0.5) & (q > 0.5)
    np.testing.assert_array_equal(figures["intersection"][:, 1], inside.sum(axis=(1, 2, 3)))


def test_a_class_that_nobody_sees_is_not_in_the_mean():
    sums = {"intersection": torch.tensor([3.0, 0, 1]), "union": torch.tensor([4.0, 0, 2])}
    assert Segmentation().of_sums(sums) == {"miou": pytest.approx((3 / 4 + 1 / 2) / 2)}


def test_pixels_to_be_ignored():
    found, expected = torch.tensor([[[0, 1], [1, 1]]]), torch.tensor([[[0, 1], [9, 0]]])
    intersection, union = overlaps(found, expected, 2, ignored=9)
    assert (intersection.tolist(), union.tolist()) == ([[1, 1]], [[2, 2]])


def test_depth(both):
    mine, theirs = (part[:, 0] for part in both)
    distance, figures = compared(Depth(), {"depth": mine}, {"depth": theirs})
    for index, (a, b) in enumerate(zip(mine.numpy(), theirs.numpy(), strict=True)):
        assert distance[index] == pytest.approx(((a - b) ** 2).mean() / b.var())
        assert figures["map_correlation"][index] == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1])
        assert figures["relative_error"][index] == pytest.approx(abs(a - b).mean() / abs(b).mean())


def test_segmentation_against_masks_of_any_size():
    """By the whole of all masks, at their own sizes, without the pixels that have no class: as the field reports it."""
    logits = drawn(3, 40, 5, 6)  # more classes than are resized at once
    generator = torch.Generator().manual_seed(2)
    masks = [torch.randint(-1, 40, size, generator=generator) for size in ((11, 7), (5, 6))] + [None]
    task, both, either = Segmentation(), np.zeros(40), np.zeros(40)
    for one, mask in zip(logits, masks[:2], strict=False):
        large = torch.nn.functional.interpolate(one[None], tuple(mask.shape), mode="bilinear")
        found = large[0].numpy().argmax(axis=0)
        for number in range(40):
            inside = mask.numpy() != -1
            mine, theirs = (found == number) & inside, (mask.numpy() == number) & inside
            both[number] += (mine & theirs).sum()
            either[number] += (mine | theirs).sum()
    columns, labelled = task.against_labels({"logits": logits}, masks)
    assert labelled.tolist() == [True, True, False]
    iou = [one / other for one, other in zip(both, either, strict=True) if other]
    assert task.of_labels(columns) == {"label_miou": pytest.approx(np.mean(iou), abs=1e-12)}
    own = [classes_at(one, (5, 6)) for one in logits]
    assert task.of_labels(task.against_labels({"logits": logits}, own)[0]) == {"label_miou": 1.0}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2), "labels must be a map"),
        ([torch.zeros(4, 4)], "for each of 2 images"),
        ([torch.full((4, 4), 7), None], "a mask holds the class 7, and the model's classes run from 0 to 4"),
    ],
)
def test_masks_that_are_none(labels, message):
    with pytest.raises(ValueError, match=message):
        Segmentation().against_labels({"logits": drawn(2, 5, 4, 4)}, labels)


def aligned(disparity: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Depth from inverse depth, by the least squares of numpy."""
    system = np.stack([disparity, np.ones_like(disparity)], axis=1)
    scale, shift = np.linalg.lstsq(system, 1 / depth, rcond=None)[0]
    return 1 / np.maximum(scale * disparity + shift, 1 / depth.max())


@pytest.mark.parametrize("relative", [True, False])
def test_depth_against_labels(relative):
    """Of a relative model after the scale and shift of its inverse depth are fitted, without pixels of no depth."""
    given, task = drawn(3, 5, 6).abs(), Depth(relative)
    labels = [1 + drawn(11, 7, seed=3).abs(), 1 + drawn(5, 6, seed=4).abs(), torch.zeros(4, 4)]
    labels[0][0, :3] = torch.tensor([0.0, float("nan"), -1.0])
    columns, labelled = task.against_labels({"depth": given}, labels)
    assert labelled.tolist() == [True, True, False]
    for index, label in enumerate(labels[:2]):
        large = torch.nn.functional.interpolate(given[index][None, None], tuple(label.shape), mode="bilinear")[0, 0]
        known = label.numpy() > 0
        found, truth = large.numpy()[known], label.numpy()[known]
        found = aligned(found, truth) if relative else found
        assert float(columns["depth_mae"][index]) == pytest.approx(abs(found - truth).mean())
        assert float(columns["depth_abs_rel"][index]) == pytest.approx((abs(found - truth) / truth).mean())
        within = np.maximum(found / truth, truth / found) < 1.25
        assert float(columns["depth_delta1"][index]) == pytest.approx(within.mean())


def test_a_relative_map_is_perfect_up_to_scale_and_shift_of_its_inverse():
    depth = 1 + drawn(2, 5, 6).abs()
    columns, _ = Depth().against_labels({"depth": 3 / depth - 7}, list(depth))
    assert Depth().of_labels(columns) == {
        "depth_mae": pytest.approx(0, abs=1e-6),
        "depth_abs_rel": pytest.approx(0, abs=1e-6),
        "depth_delta1": 1.0,
    }


def test_labels_tell_of_both_models_and_are_counted():
    """Of the teacher and of the cut model, on the images that have one, image by image of an uneven batch."""
    teacher = case_named("BeitForSemanticSegmentation").model().float()
    student, images = cut_of(teacher).float(), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        own = classes_of(teacher(images).logits)
    masks = [own[0], None, own[2]]
    batches = [{"pixel_values": images[:2], "labels": masks[:2]}, {"pixel_values": images[2:], "labels": masks[2:]}]
    figures = Evaluator(teacher, labelled=True)(student, batches)
    assert (figures["images"], figures["labelled"], figures["teacher_label_miou"]) == (3, 2, 1.0)
    only = Evaluator(teacher)(student, [images[[0, 2]]])
    assert figures["label_miou"] == pytest.approx(only["miou"])  # whose labels are the teacher's own classes
    assert figures["label_miou"] < 1


def test_features():
    mine, theirs = ({"0": drawn(2, 3, 4, 4, seed=s), "1": drawn(2, 6, 2, 2, seed=s + 1)} for s in (0, 5))
    distance, figures = compared(Features(), mine, theirs)
    for index in range(2):
        pairs = [(mine[name][index].numpy(), theirs[name][index].numpy()) for name in mine]
        assert distance[index] == pytest.approx(np.mean([((a - b) ** 2).mean() / b.var() for a, b in pairs]))
        found = np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs])
        assert figures["map_correlation"][index] == pytest.approx(found)


def test_embedding(both):
    mine, theirs = (part.flatten(1) for part in both)
    distance, figures = compared(Embedding(), {"embedding": mine}, {"embedding": theirs})
    for index, (a, b) in enumerate(zip(mine.numpy(), theirs.numpy(), strict=True)):
        cosine = a @ b / np.sqrt((a @ a) * (b @ b))
        assert figures["embedding_cosine"][index] == pytest.approx(cosine)
        assert distance[index] == pytest.approx(1 - cosine)


def test_detection():
    """Each query is compared with the teacher's of the same number; boxes count where the teacher sees an object."""
    kinds, wanted = torch.tensor([[0, 1, 2, 0]]), torch.tensor([[0, 1, 0, 2]])  # 2 is no object
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.2, 0.2], [0.5, 0.5, 0.4, 0.4], [0.9, 0.9, 0.1, 0.1]]])
    moved = boxes + torch.tensor([[[0.02, 0, 0, 0], [0.15, 0, 0, 0], [0, 0.1, 0, 0], [0, 0, 0.3, 0]]])
    mine = {"logits": 20.0 * torch.nn.functional.one_hot(kinds, 3), "boxes": moved}
    theirs = {"logits": 20.0 * torch.nn.functional.one_hot(wanted, 3), "boxes": boxes}
    task = Detection()
    iou = box_iou(*(box_convert(part["boxes"][0], "cxcywh", "xyxy") for part in (mine, theirs))).diag()[:3]
    sums = {name: value.sum(dim=0) for name, value in task.figures(mine, theirs).items()}
    found = task.of_sums(sums)
    assert found["box_iou"] == pytest.approx(float(iou.mean()))
    assert found["detections"] == pytest.approx(1 / 3)  # the second moved too far, the third was not seen
    expected = (0.02 + 0.15 + 0.1) / 3
    same = {**mine, "logits": theirs["logits"]}
    assert float(task.distance(same, theirs)) == pytest.approx(5 * expected, rel=1e-4)


def test_no_objects_have_no_figures():
    nothing = {"logits": torch.tensor([[[0.0, 0, 9]]]), "boxes": torch.full((1, 1, 4), 0.5)}
    sums = {name: value.sum(dim=0) for name, value in Detection().figures(nothing, nothing).items()}
    assert Detection().of_sums(sums) == {}


FOUND = {
    "ViTForImageClassification": Classification,
    "BeitForSemanticSegmentation": Segmentation,
    "YolosForObjectDetection": Detection,
    "DPTForDepthEstimation": Depth,
    "DepthAnything": Depth,
    "UperNet": Segmentation,
    "Dinov2Backbone": Features,
    "CLIPVisionModelWithProjection": Embedding,
    "timm vit, features only": Features,
    "CLIPModel": Contrastive,
    "MetaClip2Model": Contrastive,
    "SiglipModel": Contrastive,
    "Aimv2Model": Contrastive,
}


@pytest.fixture(params=FOUND)
def case(request) -> Case:
    return case_named(request.param)


def test_a_task_is_found_from_the_class(case):
    assert type(task_of(case.build())) is FOUND[case.name]


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"num_labels": 3}, Classification),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, MultiLabel),
        ({"num_labels": 3, "problem_type": "regression"}, Regression),
        ({"num_labels": 1}, Regression),
    ],
)
def test_a_task_is_found_from_the_labels(config, task):
    assert type(task_of(make.hf("ViTForImageClassification", "ViTConfig", **config)())) is task


@pytest.mark.parametrize(("classes", "task"), [(3, Classification), (1, Regression), (0, Embedding)])
def test_a_task_is_found_from_the_classes_of_timm(classes, task):
    assert type(task_of(make.timm_model("vit_tiny_patch16_224", num_classes=classes)())) is task


def test_a_part_called_module_is_no_wrapper():
    model = torch.nn.Module()
    model.module = make.hf("ViTForImageClassification", "ViTConfig")()
    assert unwrapped(model) is model
    assert unwrapped(torch.nn.DataParallel(torch.compile(model.module))) is model.module


@pytest.mark.parametrize("name", ["Llava", "Dinov2Model", "TimmWrapperModel"])
def test_others_are_compared_by_their_tokens(name):
    assert task_of(case_named(name).build()) is None


def test_the_untouched_model_is_as_far_from_itself_as_can_be_told(case):
    """No distance, all alike, and no gradient; so whatever a cut model is measured to lose is its own."""
    model, images = case.model().float(), case.images().float()
    tower, task = Tower.of(model), task_of(model)
    found = outputs_of(model, tower, images)
    distance = task.distance(found.head, found.head)
    torch.testing.assert_close(distance, torch.zeros_like(distance), atol=1e-6, rtol=0)
    assert distance.shape == (len(images),)
    figures = Evaluator(model)(copy.deepcopy(model), [images])
    perfect = {"agreement": 1, "miou": 1, "map_correlation": 1, "embedding_cosine": 1, "detections": 1, "box_iou": 1}
    for name in figures.keys() & perfect.keys():
        assert figures[name] == pytest.approx(1, abs=1e-5)
    assert figures[task.term] == pytest.approx(0, abs=1e-6)


def test_distilling_brings_every_head_closer(case):
    """And trains no parameter that the loss does not reach, which several processes would wait for."""
    teacher, images = case.model().float(), case.images(batch=8).float()
    student = cut_of(teacher).float()
    evaluate, task = Evaluator(teacher), task_of(teacher)
    before = evaluate(student, [images])
    skipat_surgery.distill(student, teacher, [images], steps=30, rate_scale=1, progress=False)
    after = evaluate(student, [images])
    assert after[task.term] < before[task.term]
    freeze_untouched(student)
    tower = Tower.of(student)
    found, expected = outputs_of(student, tower, images), outputs_of(teacher, Tower.of(teacher), images)
    terms = skipat_surgery.distances(found, expected, tower.num_special_tokens)
    assert task.term in terms
    skipat_surgery.distillation_loss(terms, skipat_surgery.LossWeights()).backward()
    idle = [name for name, weight in student.named_parameters() if weight.requires_grad and weight.grad is None]
    assert idle == []


def test_a_decoder_stays_as_it_is():
    """A batch's own statistics in a decoder's norms would set it apart from the teacher's."""
    model = cut_of(case_named("UperNet").model())
    train_mode(model, Tower.of(model), task_of(model))
    assert not any(module.training for module in model.decode_head.modules())
    assert Tower.of(model).blocks[-1].training
    freeze_untouched(model)
    assert not any(weight.requires_grad for weight in model.decode_head.parameters())


def test_a_task_of_ones_own():
    """A module with any head: what is compared is said by a task that is given."""

    class Own(torch.nn.Module):
        def __init__(self, tower: torch.nn.Module) -> None:
            super().__init__()
            self.tower, self.decoder = tower, torch.nn.Linear(32, 1)

        def forward(self, images: torch.Tensor) -> SimpleNamespace:
            tokens = self.tower(images).last_hidden_state[:, 1:]
            return SimpleNamespace(predicted_depth=self.decoder(tokens)[..., 0].unflatten(1, (4, 4)))

    torch.manual_seed(0)
    teacher = Own(make.hf("Dinov2Model", "Dinov2Config")()).eval()
    images = torch.randn(6, 3, 32, 32)
    student = cut_of(teacher).float()
    assert task_of(teacher) is None
    before = Evaluator(teacher, task=Depth())(student, [images])
    skipat_surgery.distill(student, teacher, [images], steps=30, task=Depth(), progress=False)
    after = Evaluator(teacher, task=Depth())(student, [images])
    assert after["head"] < 0.9 * before["head"]
    assert torch.equal(student.decoder.weight, teacher.decoder.weight)


def test_outputs_of_different_tasks_are_not_compared():
    tokens = torch.randn(2, 5, 8)
    depth = Outputs(tokens, {}, {"depth": torch.ones(2, 3, 3)}, Depth())
    other = Outputs(tokens, {}, {"depth": torch.ones(2, 3, 4)}, Depth())
    assert "head" in skipat_surgery.distances(depth, depth, 1)
    assert "head" not in skipat_surgery.distances(depth, other, 1)
    assert "head" not in skipat_surgery.distances(depth, Outputs(tokens), 1)


def test_a_task_is_named_where_its_class_does_not_say():
    model = make.hf("ViTForImageClassification", "ViTConfig", num_labels=3)()
    give_task(model, task_named("multi-label"))
    student = cut_of(model)
    assert type(task_of(student)) is type(task_of(copy.deepcopy(student))) is MultiLabel
    figures = Evaluator(model.eval())(student.float().eval(), [torch.randn(2, 3, 32, 32)])
    assert "head" in figures
    assert "kl" not in figures
    give_task(model, task_named("none"))
    assert task_of(model) is None
    assert "agreement" not in Evaluator(model)(student, [torch.randn(2, 3, 32, 32)])
    with pytest.raises(ValueError, match=r"must be one of classification, multi-label, .*, none, got 'masks'"):
        task_named("masks")
    with pytest.raises(ValueError, match="got 'masks'"):
        Arguments(task="masks")


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("BeitForSemanticSegmentation", "classification"),
        ("ViTForImageClassification", "segmentation"),
        ("ViTForImageClassification", "depth"),
        ("Dinov2Model", "embedding"),
        ("Dinov2Model", "features"),
    ],
)
def test_a_task_that_does_not_fit_is_refused(name, given):
    host = loading.from_transformers(
        case_named(name).model().float(), ViTImageProcessor(size={"height": 32, "width": 32})
    )
    give_task(host.model, task_named(given))
    with pytest.raises(ValueError, match=f"--task {given}: {type(host.model).__name__} does not give what is compared"):
        check_task(host, given)


@pytest.mark.parametrize(
    "name", ["BeitForSemanticSegmentation", "ViTForImageClassification", "Dinov2Backbone", "CLIPModel"]
)
def test_a_task_that_fits_is_taken(name):
    host = loading.from_transformers(
        case_named(name).model().float(), ViTImageProcessor(size={"height": 32, "width": 32})
    )
    check_task(host, "its own")
