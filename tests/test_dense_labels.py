"""Labels that are pictures: found in a data set, read by value, and what a run measures by them."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import small_models as make
import torch
from cases import case_named
from datasets import Dataset, DatasetDict, Features
from figures import picture
from runs import recipe
from transformers import BeitImageProcessor

from skipat_surgery.commands import loading
from skipat_surgery.commands.data import load_image_data
from skipat_surgery.commands.images import ImageItems
from skipat_surgery.commands.maps import ClassMaps, DepthMaps, maps_of
from skipat_surgery.commands.whole_images import seen_whole

BICUBIC = PIL.Image.Resampling.BICUBIC
SIZE = (40, 30)  # of the pictures: (width, height)


def mask(seed: int, count: int = 5) -> PIL.Image.Image:
    values = np.random.default_rng(seed).integers(0, count, SIZE[::-1])
    values[0, 0] = 255
    return PIL.Image.fromarray(values.astype(np.uint8))


def rows(labels: list, name: str = "mask", **others: list) -> Dataset:
    columns = {"image": [picture(32).resize(SIZE) for _ in labels], name: labels, **others}
    kinds = {column: datasets.Image() for column, values in columns.items() if column not in others}
    kinds |= {column: datasets.Value("int64") for column in others}
    return Dataset.from_dict(columns, features=Features(kinds))


def read(data, split: str = "evaluation") -> list:
    part = getattr(data, split)
    items = ImageItems(part, data.image_column, data.label_column, "RGB", maps=data.maps)
    return [items[index][1] for index in range(len(items))]


@pytest.mark.parametrize("name", ["mask", "label", "annotation"])
def test_masks_are_found_beside_the_images(name):
    given = rows([mask(0), None], name, more=[1, 2])
    data = load_image_data(DatasetDict(train=rows([mask(1)], name, more=[1]), test=given), maps=ClassMaps(5))
    first, second = read(data)
    expected = np.array(mask(0)).astype(int)
    np.testing.assert_array_equal(first.numpy(), np.where(expected == 255, -1, expected))
    assert second is None
    assert (data.train_labels, data.label_column) == (1, "map")
    assert f"test: 2 images in column 'image', 1 with a label in column {name!r}" in data.summary
    assert "Labels: a class for each pixel, numbered from 0; 255 is ignored" in data.summary


def test_masks_that_count_from_one():
    maps = ClassMaps(4, reduced=True)
    data = load_image_data(DatasetDict(train=rows([mask(1)]), test=rows([mask(0)])), maps=maps)
    expected = np.array(mask(0)).astype(int)
    np.testing.assert_array_equal(read(data)[0], np.where((expected == 255) | (expected == 0), -1, expected - 1))


def test_depths_of_sixteen_bits_and_floats():
    values = np.random.default_rng(0).integers(0, 60_000, SIZE[::-1])
    depths = [PIL.Image.fromarray(values.astype(np.uint16)), PIL.Image.fromarray(values.astype(np.float32))]
    given = DatasetDict(train=rows(depths[:1], "depth_map"), test=rows(depths, "depth_map"))
    for found in read(load_image_data(given, maps=DepthMaps(1000.0))):
        np.testing.assert_allclose(found.numpy(), values / 1000, rtol=1e-6)


def test_maps_of_a_folder_with_metadata(tmp_path):
    """As datasets' folders of images name other pictures: by a column that ends in file_name."""
    for index, split in enumerate(("train", "test")):
        (tmp_path / split / "masks").mkdir(parents=True)
        picture(32).resize(SIZE).save(tmp_path / split / "0.png")
        mask(index).save(tmp_path / split / "masks" / "0.png")
        (tmp_path / split / "metadata.jsonl").write_text('{"file_name": "0.png", "mask_file_name": "masks/0.png"}\n')
    data = load_image_data(str(tmp_path), maps=ClassMaps(5))
    np.testing.assert_array_equal(read(data)[0] == -1, np.array(mask(1)) == 255)
    assert "WARNING" not in data.summary


@pytest.mark.parametrize(
    ("columns", "given", "message"),
    [
        ({"mask": 5}, {}, r"hold the class 4, and the model's run from 0 to 2, with 255 for none"),
        ({"mask": 3, "label": 3}, {}, r"several columns of labels, \['mask', 'label'\]; name one with --label_column"),
        ({"other": 3}, {}, "several columns of images"),
        ({"mask": 3}, {"label_column": "number"}, "holds Value.'int64'., not pictures with a label for each pixel"),
        ({"mask": 3}, {"label_column": "depth"}, "has no column 'depth'"),
    ],
)
def test_maps_that_are_not_clear_are_refused(columns, given, message):
    parts = [rows([mask(0, count), mask(1, count)], name).select_columns([name]) for name, count in columns.items()]
    made = datasets.concatenate_datasets([rows([None] * 2, number=[1, 2]).remove_columns("mask"), *parts], axis=1)
    with pytest.raises(ValueError, match=message):
        load_image_data(DatasetDict(train=made), maps=ClassMaps(3), **given)
    if "other" in columns:  # and taken where it is named
        assert load_image_data(DatasetDict(train=made), maps=ClassMaps(3), label_column="other").train_labels == 1


def test_without_maps_nothing_is_measured_by_them():
    data = load_image_data(DatasetDict(train=rows([mask(0), mask(1)])), maps=ClassMaps(5), label_column="none")
    assert data.label_column is None


def segmenter(**processing: object) -> loading.LoadedModel:
    case = case_named("BeitForSemanticSegmentation")
    processor = BeitImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False, **processing)
    return loading.from_transformers(case.model().float(), processor)


def test_how_maps_are_read_is_the_models_own():
    host = segmenter(do_reduce_labels=True)
    host.model.config.semantic_loss_ignore_index = 7
    assert maps_of(host) == ClassMaps(5, 7, reduced=True)
    assert maps_of(host, ignore_index=3) == ClassMaps(5, 3, reduced=True)
    depth = loading.from_transformers(make.depth_anything(), BeitImageProcessor())
    assert maps_of(depth, depth_scale=256) == DepthMaps(256)
    assert maps_of(loading.from_transformers(make.hf("ViTForImageClassification", "ViTConfig")(), None)) is None


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_pictures_are_seen_whole_at_the_models_size(size):
    """A mask belongs to all of a picture, and a crop of the preprocessing would cut it."""
    height, width = size
    host = segmenter()
    host.processor.size = {"height": 2 * height, "width": 2 * width}
    host.processor.do_center_crop, host.processor.crop_size = True, {"height": height, "width": width}
    whole = seen_whole(host).preprocess([picture(32).resize(SIZE)])
    plain = segmenter(do_resize=False).preprocess([picture(32).resize(SIZE).resize((width, height), BICUBIC)])
    torch.testing.assert_close(whole, plain, atol=1e-5, rtol=0)


def test_a_run_measures_by_masks(tmp_path, monkeypatch):
    """By value: what the table says of both models, by plain lines on the same pictures."""
    host = segmenter()
    host.save(host.model, tmp_path / "model")
    data = DatasetDict(train=rows([mask(seed) for seed in range(8)]), test=rows([mask(seed) for seed in range(20, 25)]))
    for split, part in data.items():
        (tmp_path / "data").mkdir(exist_ok=True)
        part.to_parquet(tmp_path / "data" / f"{split}.parquet")
    monkeypatch.setattr("skipat_surgery.commands.distill.difference_after_reload", lambda *given: 0.0)
    given = {"dataset": str(tmp_path / "data"), "solve_images": 8, "batch_size": 2, "max_steps": 0}
    run = recipe(tmp_path / "model", tmp_path / "run", **given)
    run.run()
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    for row, folder in (("teacher", tmp_path / "model"), ("solved", tmp_path / "run" / "last")):
        assert found["rows"][row]["label_miou"] == pytest.approx(plain_miou(folder, data["test"]), abs=1e-9)
    assert found["rows"]["solved"]["labelled"] == 5
    assert f"{100 * found['rows']['teacher']['label_miou']:.2f}" in (tmp_path / "run/last/README.md").read_text()
    assert "label_miou" in found["best"]["figures"]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert page.count("teacher's classes") == page.count("cut's classes") == 5
    assert f">{host.model.config.id2label[0]}</li>" in page


def plain_miou(folder: Path, test: Dataset) -> float:
    host = seen_whole(loading.load(str(folder)))
    both, either = np.zeros(5), np.zeros(5)
    for row in test:
        with torch.no_grad():
            logits = host.model(host.preprocess([row["image"]])).logits
        found = torch.nn.functional.interpolate(logits, SIZE[::-1], mode="bilinear").argmax(dim=1)[0].numpy()
        truth = np.array(row["mask"])
        for number in range(5):
            mine, theirs = (found == number) & (truth != 255), truth == number
            both[number] += (mine & theirs).sum()
            either[number] += (mine | theirs).sum()
    return float((both / either).mean())
