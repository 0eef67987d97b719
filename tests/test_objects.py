"""Labels that are objects: found in a data set, read by value, and the mAP that a run measures by them."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from cases import case_named
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from figures import picture
from runs import recipe
from torch import nn
from torchmetrics.detection import MeanAveragePrecision
from transformers import YolosImageProcessor

import skipat_surgery
from skipat_surgery.commands import loading
from skipat_surgery.commands.data import load_image_data
from skipat_surgery.commands.images import ImageItems
from skipat_surgery.commands.maps import maps_of
from skipat_surgery.commands.objects import ObjectLists
from skipat_surgery.commands.whole_images import seen_whole
from skipat_surgery.tasks.detection import MOST, Detection

THREE = ObjectLists(3)
SIZE = (40, 20)  # of the pictures: (width, height)
BOX = List(Value("float32"))
LISTS = {"bbox": List(BOX), "category": List(Value("int64"))}
NAMED = {"bbox": List(BOX), "category": List(ClassLabel(names=["dog", "cat", "bird"]))}
EACH = List({"box": BOX, "label": Value("int64")})


def rows(objects: list, feature: object = LISTS, name: str = "objects") -> Dataset:
    columns = {"image": [picture(32).resize(SIZE) for _ in objects], name: objects}
    return Dataset.from_dict(columns, features=Features({"image": datasets.Image(), name: feature}))


def read(given: Dataset, maps: ObjectLists = THREE, **kwargs: object) -> list:
    data = load_image_data(DatasetDict(train=given, test=given), maps=maps, **kwargs)
    items = ImageItems(data.evaluation, data.image_column, data.label_column, "RGB", maps=data.maps)
    return [items[index][1] for index in range(len(items))]


TWO = {"bbox": [[0, 0, 20, 10], [10, 5, 10, 15]], "category": [2, 0]}
CENTRES = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.375, 0.625, 0.25, 0.75]])


@pytest.mark.parametrize("name", ["objects", "annotations", "labels"])
def test_lists_of_boxes_and_classes(name):
    first, second, third = read(rows([TWO, None, {"bbox": [], "category": []}], name=name))
    torch.testing.assert_close(first["boxes"], CENTRES)
    assert first["class_labels"].tolist() == [2, 0]
    assert second is None
    assert (third["boxes"].shape, len(third["class_labels"])) == ((0, 4), 0)


def test_a_list_of_objects_by_two_corners():
    given = [{"box": [0, 0, 20, 10], "label": 2}, {"box": [10, 5, 20, 20], "label": 0}]
    (found,) = read(rows([given], EACH), ObjectLists(3, box_format="xyxy"))
    torch.testing.assert_close(found["boxes"], CENTRES)
    assert found["class_labels"].tolist() == [2, 0]


def test_classes_are_the_models_by_their_names():
    (found,) = read(rows([TWO], NAMED), ObjectLists(3, ("bird", "cat", "dog")))
    assert found["class_labels"].tolist() == [0, 2]


def test_what_was_found_is_said():
    given = rows([TWO, None])
    summary = load_image_data(DatasetDict(train=given, test=given), maps=ObjectLists(3)).summary
    assert "test: 2 images in column 'image', 1 with a label in column 'objects'" in summary
    assert "Labels: objects, a class and a box for each, xywh in pixels" in summary


@pytest.mark.parametrize(
    ("maps", "given", "kwargs", "message"),
    [
        (ObjectLists(2), TWO, {}, "are of the class 2, and the model's run from 0 to 1"),
        (ObjectLists(3), {"bbox": [[0, 0, -1, 2]], "category": [1]}, {}, "end before they begin, read as xywh"),
        (ObjectLists(3), {"bbox": [[0, 0, 1, 2]], "category": [1, 1]}, {}, "are 2 with 1 boxes"),
        (ObjectLists(3), TWO, {"label_column": "image"}, "not objects with one of .*bbox.*category"),
        (ObjectLists(3), TWO, {"label_column": "boxes"}, "has no column 'boxes'"),
    ],
)
def test_objects_that_are_not_clear_are_refused(maps, given, kwargs, message):
    with pytest.raises(ValueError, match=message):
        read(rows([given, given]), maps, **kwargs)


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match=r"--box_format must be one of .*got 'yxyx'"):
        ObjectLists(3, box_format="yxyx")


def head(kinds: list[int], boxes: list[list[float]], sure: list[float]) -> dict[str, torch.Tensor]:
    """Of one image and three classes; 3 is no object."""
    logits = torch.tensor(sure)[:, None] * nn.functional.one_hot(torch.tensor(kinds), 4)
    return {"logits": logits[None], "boxes": torch.tensor([boxes])}


def test_mean_average_precision_by_hand():
    """One of two objects is found, the surest of all; a box of IoU 0.6 counts at three of ten thresholds."""
    boxes = [[0.25, 0.25, 0.5, 0.5], [0.7, 0.7, 0.2, 0.2], [0.9, 0.1, 0.1, 0.1]]
    found = head([0, 3, 3], boxes, [9.0, 20.0, 20.0])
    labels = [{"class_labels": torch.tensor([0, 0]), "boxes": torch.tensor([boxes[0], [0.5, 0.9, 0.1, 0.1]])}]
    columns, labelled = Detection().against_labels(found, labels)
    assert labelled.tolist() == [True]
    half = 51 / 101  # of the recalls from 0 to 1, those up to a half
    assert Detection().of_labels(columns) == pytest.approx({"label_map": half, "label_map50": half})
    near = head([0, 3, 3], [[0.25, 0.25, 0.5, 0.3], *boxes[1:]], [9.0, 20.0, 20.0])  # IoU 0.6
    measured = Detection().of_labels(Detection().against_labels(near, labels)[0])
    assert measured == pytest.approx({"label_map": 0.3 * half, "label_map50": half})


def test_images_without_labels_or_objects_have_no_figures():
    found = head([0], [[0.5, 0.5, 0.1, 0.1]], [9.0])
    empty = {"class_labels": torch.empty(0, dtype=torch.long), "boxes": torch.empty(0, 4)}
    for labels, there in (([None], False), ([empty], True)):
        columns, labelled = Detection().against_labels(found, labels)
        assert labelled.tolist() == [there]
        assert Detection().of_labels(columns) == {}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "labels must be of 1 images, got 0"),
        ([3], r"must be class_labels \(n,\) and boxes \(n, 4\), or None, got 3"),
        (
            [{"class_labels": torch.tensor([3]), "boxes": torch.ones(1, 4)}],
            "from 3 to 3, and the model's run from 0 to 2",
        ),
        ([{"class_labels": torch.tensor([0]), "boxes": torch.ones(2, 4)}], "a box for each class"),
        ([{"class_labels": torch.zeros(MOST + 1), "boxes": torch.ones(MOST + 1, 4)}], "1000 at most"),
    ],
)
def test_other_labels_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        Detection().against_labels(head([0], [[0.5, 0.5, 0.1, 0.1]], [9.0]), labels)


def plain_map(folder: str, test: Dataset) -> float:
    """The mAP of a saved detector, by transformers' own post-processing and boxes in pixels."""
    host, metric = seen_whole(loading.load(folder)), MeanAveragePrecision()
    for row in test:
        with torch.no_grad():
            output = host.model.eval()(host.preprocess([row["image"]]))
        sizes = torch.tensor([SIZE[::-1]])
        (found,) = YolosImageProcessor().post_process_object_detection(output, 0.0, target_sizes=sizes)
        corners = [[x, y, x + width, y + height] for x, y, width, height in row["objects"]["bbox"]]
        truth = {"boxes": torch.tensor(corners), "labels": torch.tensor(row["objects"]["category"])}
        metric.update([found], [truth])
    return float(metric.compute()["map"])


def test_a_run_measures_by_objects(tmp_path, monkeypatch):
    """By value: what the table says of both models, by plain lines on the same pictures."""
    host = loading.from_transformers(
        case_named("YolosForObjectDetection").model().float(),
        YolosImageProcessor(size={"height": 32, "width": 32}, do_pad=False),
    )
    assert maps_of(host, box_format="xyxy") == ObjectLists(host.model.config.num_labels, box_format="xyxy")
    host.save(host.model, tmp_path / "model")
    places = [[0, 0, 40, 20], [10, 5, 20, 10], [0, 0, 20, 20]]
    given = [{"bbox": places, "category": [0, 1, 0]} for _ in range(8)]
    data = DatasetDict(train=rows(given), test=rows(given[:4]))
    (tmp_path / "data").mkdir()
    for split, part in data.items():
        part.to_parquet(tmp_path / "data" / f"{split}.parquet")
    monkeypatch.setattr("skipat_surgery.commands.distill.difference_after_reload", lambda *given: 0.0)
    settings = {"dataset": str(tmp_path / "data"), "solve_images": 8, "batch_size": 2, "max_steps": 0}
    recipe(tmp_path / "model", tmp_path / "run", **settings).run()
    found = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    for row, folder in (("teacher", "model"), ("solved", "run/last")):
        expected = plain_map(str(tmp_path / folder), data["test"])
        assert found[row]["label_map"] == pytest.approx(expected, abs=1e-6)
    assert found["teacher"]["label_map"] > 0
    assert found["solved"]["labelled"] == 4
    assert "mAP %" in (tmp_path / "run/last/README.md").read_text()


def test_the_library_alone_measures_by_objects():
    model = case_named("YolosForObjectDetection").model().float()
    student = skipat_surgery.apply(case_named("YolosForObjectDetection").model().float(), [2])
    labels = [{"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 1.0, 1.0]])}, None]
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": labels}
    figures = skipat_surgery.Evaluator(model, labelled=True)(student, [batch])
    assert figures["labelled"] == 1
    assert 0 <= figures["label_map"] <= figures["label_map50"] <= 1
    assert {"teacher_label_map", "teacher_label_map50"} <= figures.keys()
