"""Data sets as people keep them: what is found in them, by value, or said not to be."""

from __future__ import annotations

import json
from pathlib import Path, PurePath

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from skipat_surgery.commands.data import ImageData, load_image_data
from skipat_surgery.commands.decoding import decode
from skipat_surgery.commands.images import ImageItems, ReadableBatches
from skipat_surgery.commands.layouts import files_in, split_of_file, split_of_folder

GRAY = [10, 60, 110, 160, 210]  # pictures told apart by their value


def picture(value: int) -> PIL.Image.Image:
    return PIL.Image.new("L", (2, 2), value)


def write(folder: Path, *paths: str) -> Path:
    """Pictures at these paths, as bright as GRAY says, in order."""
    for path, value in zip(paths, GRAY, strict=False):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        picture(value).save(folder / path)
    return folder


def held(data: ImageData, split: str = "train") -> dict[int, int]:
    """The label of each picture by its brightness, as a run reads it."""
    items = ImageItems(getattr(data, split), data.image_column, data.label_column, "L")
    return {image.getpixel((0, 0)): label for image, label in (items[index] for index in range(len(items)))}


def both(data: ImageData) -> dict[int, int]:
    """Both splits, where the evaluation split was taken from the other one."""
    return held(data) | held(data, "evaluation")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("Training", "train"),
        ("val", "validation"),
        ("test2017", "test"),
        ("test tube", None),
        ("trains", None),
        ("a train", None),
    ],
)
def test_a_folder_is_a_split_by_its_whole_name(name, split):
    assert split_of_folder(name) == split


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("coco_val2017.csv", "validation"),
        ("test/a.parquet", "test"),
        ("train_and_test.csv", None),
        ("contrast.csv", None),
    ],
)
def test_a_table_is_of_the_one_split_that_it_names(path, split):
    assert split_of_file(PurePath(path)) == split


def test_classes_called_like_splits(tmp_path):
    """A folder ``test tube`` is a class, and so is a folder ``train`` beside ``bus``."""
    data = load_image_data(str(write(tmp_path / "tubes", "cat/0.png", "dog/0.png", "test tube/0.png")))
    assert both(data) == {10: 0, 60: 1, 110: 2}
    assert "Files: 3 found, 3 used" in data.summary
    data = load_image_data(str(write(tmp_path / "traffic", "bus/0.png", "train/0.png", "train/1.png")))
    assert both(data) == {10: 0, 60: 1, 110: 1}


def test_splits_are_no_labels(tmp_path):
    data = load_image_data(str(write(tmp_path, "train/0.png", "train/1.png", "test/0.png")), num_classes=2)
    assert data.label_column is None
    assert (set(held(data)), set(held(data, "evaluation"))) == ({10, 60}, {110})
    assert "train: 2 images in column 'image', no labels (no folders of classes)" in data.summary
    assert "WARNING" not in data.summary


def test_splits_of_classes_below_a_lone_folder(tmp_path):
    paths = "data/train/a/0.png", "data/train/b/0.png", "data/val/b/0.png"
    data = load_image_data(str(write(tmp_path, *paths)))
    assert (held(data), held(data, "evaluation")) == ({10: 0, 60: 1}, {110: 1})


@pytest.mark.parametrize(
    ("paths", "reason"),
    [
        (("a/0.png", "b/0.png", "1.png"), "images lie at different depths, such as in the folder itself and a"),
        (("a/x/0.png", "b/y/0.png"), "either level of folders may be the class, as in"),
    ],
)
def test_labels_that_are_not_found_are_said_not_to_be(paths, reason, tmp_path):
    data = load_image_data(str(write(tmp_path, *paths)), num_classes=2)
    assert data.label_column is None
    assert f"WARNING: no labels: {reason}" in data.summary


def test_the_level_of_folders_that_tells_images_apart_is_their_class(tmp_path):
    data = load_image_data(str(write(tmp_path, "n01/images/0.png", "n02/images/0.png")))
    assert both(data) == {10: 0, 60: 1}


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (("train/0.png", "test/0.png", "more/0.png"), "beside them lie images of none, such as more"),
        (("train/0.png", "test/0.png", "1.png"), "beside them lie images of none, such as 1.png"),
        (("val/0.png", "valid/0.png"), "are the same split under two names"),
        (("0.png",), "has one image, and one split"),
        ((), "cannot be read as a data set"),
    ],
)
def test_layouts_that_are_not_clear_are_refused(paths, message, tmp_path):
    tmp_path.joinpath("notes.txt").touch()
    with pytest.raises(ValueError, match=message):
        load_image_data(str(write(tmp_path, *paths)))


def test_files_that_are_not_used_are_said(tmp_path):
    write(tmp_path, "a/0.png", "b/1.PNG", ".hidden/2.png")
    (tmp_path / "a" / "list.txt").touch()
    (tmp_path / "labels.csv").touch()
    summary = load_image_data(str(tmp_path)).summary
    assert "Files: 2 found, 2 used" in summary
    assert "WARNING: 2 files are not used, as they are no images: 1 .csv, 1 .txt; the first is labels.csv" in summary


def test_a_folder_linked_into_itself_ends(tmp_path):
    write(tmp_path / "data", "a/0.png", "b/1.png")
    write(tmp_path / "elsewhere", "2.png")
    (tmp_path / "data" / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "a" / "again").symlink_to(tmp_path / "data")
    assert [str(path) for path in files_in(tmp_path / "data").images] == ["a/0.png", "b/1.png", "c/2.png"]


def test_a_metadata_file(tmp_path):
    write(tmp_path, "train/0.png", "train/1.png", "test/2.png", "test/3.png")
    (tmp_path / "train" / "metadata.csv").write_text("file_name,label\n0.png,dog\n1.png,cat\n")
    (tmp_path / "test" / "metadata.csv").write_text("file_name,label\n2.png,cat\n")
    data = load_image_data(str(tmp_path))
    assert (held(data), held(data, "evaluation")) == ({10: 1, 60: 0}, {110: 0})
    assert "Files: 4 found, 3 used" in data.summary
    assert "WARNING: 1 files are not used, as they are not named in the metadata: 1 .png" in data.summary
    (tmp_path / "test" / "metadata.csv").write_text("file_name,label\n2.png,cat\n4.png,cat\n")
    with pytest.raises(ValueError, match=r"metadata.csv names 1 images that are not there, such as test/4.png"):
        load_image_data(str(tmp_path))
    (tmp_path / "test" / "metadata.csv").write_text("name,label\n2.png,cat\n")
    with pytest.raises(ValueError, match=r"metadata.csv must have a column file_name"):
        load_image_data(str(tmp_path))


KINDS = {
    "uint8": ([3, 1, None, 0], Value("uint8"), [3, 1, -1, 0]),
    "bool": ([True, False, None, True], Value("bool"), [1, 0, -1, 1]),
    "floats of whole numbers": ([2.0, float("nan"), None, 0.0], Value("float64"), [2, -1, -1, 0]),
    "text": (["dog", None, "", "cat"], Value("string"), [1, -1, -1, 0]),
    "numbers as text": (["10", "2", "1", "2"], Value("string"), [2, 1, 0, 1]),
    "classes": ([1, -1, None, 0], ClassLabel(names=["b", "a"]), [1, -1, -1, 0]),
}


def table(labels: list, feature: object, column: str = "label", image: str = "image") -> Dataset:
    features = Features({image: datasets.Image(), column: feature})
    rows = {image: [picture(value) for value in GRAY[: len(labels)]], column: labels}
    return Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize("column", ["label", "labels", "target"])
@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_every_type_and_name(kind, column):
    labels, feature, expected = KINDS[kind]
    rows = table(labels, feature, column)
    data = load_image_data(DatasetDict(train=rows, test=rows))
    assert list(held(data).values()) == expected
    assert data.train_labels == sum(label >= 0 for label in expected)


@pytest.mark.parametrize("labels", [[None, None], [-1, -1]])
def test_all_labels_missing_means_no_labels(labels):
    rows = table(labels, ClassLabel(names=["a", "b"]))
    data = load_image_data(DatasetDict(train=rows, test=rows), num_classes=2)
    assert (data.label_column, data.train_labels) == (None, 0)
    assert "2 images in column 'image', no labels (all are missing)" in data.summary


def test_some_labels_missing_is_said():
    rows = table([0, None, 1, -1], ClassLabel(names=["a", "b"]))
    summary = load_image_data(DatasetDict(train=rows, test=rows), num_classes=2).summary
    assert "4 images in column 'image', 2 with a label in column 'label': a 1, b 1" in summary
    assert "WARNING: images without a label, which count beside the teacher alone: 2 of 'train', 2 of 'test'" in summary


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ([1, 2, 3], Value("int64"), "labels of the data set run from 1 to 3, and the classes run from 0 to 2"),
        ([0, -100], Value("int64"), "labels of the data set run from -100 to 0"),
        ([0.5, 1.0], Value("float32"), "not one class for each image"),
        ([[0], [1]], datasets.List(Value("int64")), "not one class for each image"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, feature, message):
    rows = table(labels, feature)
    with pytest.raises(ValueError, match=message):
        load_image_data(DatasetDict(train=rows, test=rows), label_column="label", num_classes=3)


def test_lists_of_labels_are_said_not_to_be_used():
    rows = table([[0], [1]], datasets.List(Value("int64")), "labels")
    data = load_image_data(DatasetDict(train=rows, test=rows), num_classes=3)
    assert data.label_column is None
    assert "no labels (column 'labels' holds List(Value('int64')), not one class for each image)" in data.summary


def test_splits_whose_classes_have_another_order_are_brought_to_one():
    train, test = (table([0, 1, 2], ClassLabel(names=list(names))) for names in ("abc", "cab"))
    data = load_image_data(DatasetDict(train=train, test=test), num_classes=3)
    assert (held(data), held(data, "evaluation")) == ({10: 0, 60: 1, 110: 2}, {10: 2, 60: 0, 110: 1})
    assert "in different orders, and were brought to one by the names" in data.summary


def test_a_split_without_labels_or_with_another_column_of_images():
    train, test = table([0, 1], ClassLabel(names=["a", "b"])), table([1, 0], Value("int64"), "other", "img")
    splits = DatasetDict(train=train, test=test)
    data = load_image_data(splits, num_classes=2)
    assert (held(data), held(data, "evaluation")) == ({10: 0, 60: 1}, {10: -1, 60: -1})
    assert "WARNING: 'test' has no labels, and 'train' has" in data.summary
    with pytest.raises(ValueError, match=r"split 'test' of the data set has no column 'label'; its columns are"):
        load_image_data(splits, label_column="label", num_classes=2)
    with pytest.raises(ValueError, match=r"split 'test' of the data set has no column 'image'; its columns are"):
        load_image_data(splits, image_column="image", num_classes=2)


@pytest.mark.parametrize("kind", ["absolute", "relative", "bytes"])
def test_columns_of_paths_and_of_bytes(kind, tmp_path):
    write(tmp_path / "pictures", "0.png", "1.png")
    paths = [tmp_path / "pictures" / f"{number}.png" for number in range(2)]
    given = {
        "absolute": lambda path: str(path),
        "relative": lambda path: str(path.relative_to(tmp_path)),
        "bytes": lambda path: path.read_bytes(),
    }
    rows = {"what": [given[kind](path) for path in paths], "note": ["one", "two"], "label": [1, 0]}
    if kind == "bytes":
        Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
        file = tmp_path / "train.parquet"
    else:
        file = tmp_path / "train.csv"
        Dataset.from_dict(rows).to_csv(file)
    for column in (None, "what"):
        assert both(load_image_data(str(file), image_column=column)) == {10: 1, 60: 0}
    with pytest.raises(ValueError, match=r"column 'note' of .* holds .*, not images, their bytes, or paths"):
        load_image_data(str(file), image_column="note")


def test_paths_of_files_that_are_not_there_are_refused(tmp_path):
    write(tmp_path, "0.png")
    (tmp_path / "train.csv").write_text("path,label\n0.png,0\n1.png,1\n")
    with pytest.raises(ValueError, match=r"column 'path' .*: 1 of its 2 files are not there, such as 1.png"):
        load_image_data(str(tmp_path / "train.csv"))


def test_tables_of_different_columns_and_orders(tmp_path):
    """Which ``datasets`` reads as the first one's columns and order, or not at all."""
    first, second = (table([0, 1], ClassLabel(names=list(names))) for names in ("ab", "ba"))
    first.add_column("more", [1, 2]).to_parquet(tmp_path / "one.parquet")
    second.remove_columns("label").to_parquet(tmp_path / "two.parquet")
    third = Dataset.from_dict({"image": [picture(value) for value in GRAY[2:4]], "label": [0, 1]}, second.features)
    third.to_parquet(tmp_path / "three.parquet")
    data = load_image_data(str(tmp_path), train_split="train", num_classes=2)
    assert (both(data)[110], both(data)[160]) == (1, 0)
    assert len(data.train) + len(data.evaluation) == 6
    assert data.train_labels + sum(label >= 0 for label in data.evaluation["label"]) == 4
    assert "Files: 3 found, 3 used" in data.summary


def test_a_table_beside_the_splits_is_refused(tmp_path):
    for name in ("train", "test", "extra"):
        table([0, 1], Value("int64")).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"extra.parquet names no split, and others beside it do"):
        load_image_data(str(tmp_path))
    (tmp_path / "extra.parquet").unlink()
    (tmp_path / "classes.csv").write_text("a,b\n")
    summary = load_image_data(str(tmp_path)).summary
    assert "WARNING: 1 files are not used, as they are not of kind .parquet: 1 .csv" in summary


def test_a_damaged_table_is_named(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(ValueError, match=f"{tmp_path} holds a table that cannot be read"):
        load_image_data(str(tmp_path))


def test_a_card_that_names_the_files_is_followed(tmp_path):
    for name in ("first", "second"):
        table([0, 1], Value("int64")).to_parquet(tmp_path / f"{name}.parquet")
    header = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "second.parquet"}]}]}
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(header['configs'])}\n---\n")
    data = load_image_data(str(tmp_path))
    assert len(data.train) + len(data.evaluation) == 2


def test_splits_by_another_of_their_names(tmp_path):
    write(tmp_path, "training/a/0.png", "dev/a/0.png", "test/a/0.png")
    data = load_image_data(str(tmp_path), eval_split="dev")
    assert held(data, "evaluation") == {60: 0}
    assert "Not used: split test (1 images)" in data.summary
    with pytest.raises(ValueError, match="has no split 'else'"):
        load_image_data(str(tmp_path), eval_split="else")


def test_a_picture_kept_by_datasets_is_decoded_as_it_was(tmp_path):
    rows = table([0, 1], ClassLabel(names=["a", "b"]))
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "saved")
    data = load_image_data(str(tmp_path / "saved"))
    assert held(data, "evaluation") == {10: 0, 60: 1}
    assert np.asarray(decode(data.train[1]["image"], "RGB")).tolist() == [[[60] * 3] * 2] * 2


def test_corrupt_pictures_leave_full_batches(tmp_path):
    """Wherever they lie: the last one alone in its batch too."""
    write(tmp_path, "0.png", "1.png", "2.png", "3.png", "4.png")
    for name in ("1.png", "4.png"):
        (tmp_path / name).write_bytes(b"no picture")
    paths = [{"bytes": None, "path": str(tmp_path / f"{number}.png")} for number in range(5)]
    items = ImageItems(Dataset.from_dict({"image": paths}), "image", None, "L")
    for size, expected in ((1, [[10], [110], [160]]), (2, [[10, 110], [160]]), (4, [[10, 110, 160]])):
        batches = ReadableBatches(
            items, range(5), size, lambda images: torch.tensor([i.getpixel((0, 0)) for i in images])
        )
        assert [batch.tolist() for batch in batches] == expected
    assert list(ReadableBatches(items, [1, 4], 2, torch.tensor)) == []
