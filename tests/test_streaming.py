"""Images that are read as they come: WebDataset shards and tables, in equal shares, from any position on."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import datasets
import pytest
import torch
from runs import recipe, small_teacher
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from skipat_surgery.commands import streaming
from skipat_surgery.commands.digits import load_digits
from skipat_surgery.convert.stream import Share, Stream, Streamed
from skipat_surgery.convert.training import Training

BATCH, TOTAL = 3, 36


@pytest.fixture(scope="module")
def teacher(once) -> Path:
    return once("small_teacher", small_teacher)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """160 digits in four shards as WebDataset writes them, one of them corrupt."""
    folder = tmp_path_factory.mktemp("shards")
    rows = load_digits()["train"].select(range(160))
    for shard in range(4):
        with tarfile.open(folder / f"train-{shard:03}.tar", "w") as file:
            for index in range(40 * shard, 40 * shard + 40):
                picture = io.BytesIO()
                rows[index]["image"].save(picture, "png")
                content = {"png": b"no picture" if index == 77 else picture.getvalue()}
                for ending, data in {**content, "cls": str(rows[index]["label"]).encode()}.items():
                    entry = tarfile.TarInfo(f"{index:06}.{ending}")
                    entry.size = len(data)
                    file.addfile(entry, io.BytesIO(data))
    return folder


def numbered(length: int) -> Streamed:
    """Rows that are numbers, in the order that `Stream` draws, and items that are their places."""
    seed = 5
    return Streamed(lambda epoch: (index for _, index in Stream(length, length, seed + epoch)), lambda *place: place)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 12])
def test_processes_and_workers_share_a_stream_as_they_share_a_table(start, workers):
    whole = list(Stream(10, TOTAL, 5))
    batches = [tuple(whole[first : first + BATCH]) for first in range(start, TOTAL, BATCH)]
    for process in range(2):
        share = Share(numbered(10), start, TOTAL, BATCH, process, 2)
        found = list(DataLoader(share, BATCH, collate_fn=tuple, num_workers=workers, drop_last=True))
        assert found == batches[process::2]
        assert len(share) == sum(map(len, found))


def test_a_stream_without_rows_is_refused_rather_than_read_for_ever():
    with pytest.raises(ValueError, match="empty"):
        next(Streamed(lambda epoch: [], lambda *place: place).places(0, 1))


@pytest.mark.parametrize("pattern", ["", "train-*.tar"])
def test_shards_are_read_by_their_folder_or_by_their_pattern(shards, pattern):
    splits = streaming.open_stream(str(shards / pattern), None)
    found, stream = streaming.read_stream("shards", splits, ("train", "train"), None, (32, 1000), 0)
    assert stream.column == "png"
    (first,), (measured,) = found.splits["train"], found.splits["test"]
    assert len(first) == 32
    assert {"png", "cls"} <= set(first.column_names)
    epochs = [[row["image"]["bytes"] for row in stream.epoch(number)] for number in range(2)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    kept = {row["bytes"] for row in measured["png"]}
    assert 5 < len(kept) < 40
    assert not kept & set(epochs[0])
    assert len(kept) + len(set(epochs[0])) == 160
    assert {row["bytes"] for row in first["png"]} <= set(epochs[0])


@pytest.mark.parametrize("stored", [datasets.Image(), datasets.Value("binary")], ids=["images", "bytes"])
def test_a_table_of_images_or_of_their_bytes_is_streamed(stored, shards, tmp_path):
    rows = [row["image"]["bytes"] for row in images_of(shards)]
    values = [{"bytes": row, "path": None} for row in rows] if isinstance(stored, datasets.Image) else rows
    table = datasets.Dataset.from_dict({"picture": values}, features=datasets.Features({"picture": stored}))
    table.to_parquet(tmp_path / "train.parquet")
    splits = streaming.open_stream(str(tmp_path / "train.parquet"), None)
    _, stream = streaming.read_stream("table", splits, ("train", "train"), None, (8, 8), 0)
    assert {row["image"]["bytes"] for row in stream.epoch(0)} < set(rows)


def images_of(shards: Path) -> list:
    splits = streaming.open_stream(str(shards), None)
    return list(streaming.ImageStream(splits["train"], "png", 0).epoch(0))


def test_what_cannot_be_streamed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be streamed"):
        streaming.open_stream(str(tmp_path / "nowhere"), None)


def test_a_run_over_shards_resumes_to_the_same_weights(teacher, shards, tmp_path, monkeypatch):
    given = {"dataset": str(shards), "streaming": True, "solve_images": 32, "max_steps": 12, "eval_images": 16}
    whole = recipe(teacher, tmp_path / "whole", **given)
    assert "'cls'" in whole.data.summary
    whole.run()
    fit, progress = Training.fit, whole.progress
    assert progress.step == 12  # 192 images of 144: into the second epoch
    assert progress.corrupt >= 1
    assert progress.rows["distilled"]["agreement"] > 0.9

    def broken(training, loader, measure, save):
        def then_break(step):
            save(step)
            if step == 10:
                raise KeyboardInterrupt

        fit(training, loader, measure, then_break)

    monkeypatch.setattr(Training, "fit", broken)
    with pytest.raises(KeyboardInterrupt):
        recipe(teacher, tmp_path / "broken", **given).run()
    monkeypatch.setattr(Training, "fit", fit)
    resumed = recipe(teacher, tmp_path / "broken", resume=True, num_workers=2, **given)
    resumed.run()
    expected, found = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("whole", "broken"))
    for name, weight in expected.items():
        assert torch.equal(weight, found[name]), name


def test_labels_of_a_stream_cannot_be_learnt_from(teacher, shards, tmp_path):
    with pytest.raises(ValueError, match="label_weight reads the labels of all images first"):
        recipe(teacher, tmp_path, dataset=str(shards), streaming=True, solve_images=32, label_weight=1.0)
    assert not list(tmp_path.iterdir())
