"""Object discovery: each measure beside a plain reference of it, the formats of annotations, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import scipy.linalg
import small_models
import torch
import transformers
from cases import case_named
from datasets import Dataset, Features, Image, List, Value

import skipat_surgery
from skipat_surgery.analysis.discovery import Truth, centred, jaccard, localised, lost, most_of, tokencut
from skipat_surgery.analysis.discovery_figures import TRIVIAL, Discovery, figures_of, trivial
from skipat_surgery.analysis.last_block import check_last_block, read_last_block
from skipat_surgery.commands import discover, loading
from skipat_surgery.commands.annotations import Columns, read_annotations
from skipat_surgery.commands.whole_images import WholeImages
from skipat_surgery.tower import Tower

GRID = (6, 8)
BRIGHT, DARK = torch.tensor([1.0, 0.2, 0.0]), torch.tensor([-1.0, 0.2, 0.0])


pytestmark = pytest.mark.usefixtures("fresh_process")


# What CLS attends to


def test_the_fewest_patches_that_hold_a_mass():
    attention = torch.tensor([[[0.5, 0.3], [0.15, 0.05]], [[2.0, 2.0], [2.0, 14.0]]])  # the second sums to 20
    assert most_of(attention, 0.4).int().tolist() == [[[1, 0], [0, 0]], [[0, 0], [0, 1]]]
    assert most_of(attention, 0.6).int().tolist() == [[[1, 1], [0, 0]], [[0, 0], [0, 1]]]
    assert most_of(attention, 0.9).int().tolist()[0] == [[1, 1], [1, 0]]
    assert most_of(attention, 0.96).int().tolist() == [[[1, 1], [1, 1]], [[1, 1], [1, 1]]]


def test_jaccard_of_two_heads_with_two_classes_by_hand():
    heads = torch.tensor([[[True, False]], [[True, True]]])  # 1 × 2 patches of 2 × 2 pixels
    mask = torch.tensor([[3, 3, 0, 7], [3, -1, 0, 0]])  # three pixels of class 3, one of 7, one void
    # head 0 holds the left half, of which one pixel is void: 3 of 3 for class 3, and 0 of 4 for class 7
    assert jaccard(heads, mask).tolist() == [[1.0, pytest.approx(3 / 7)], [0.0, pytest.approx(1 / 7)]]
    assert jaccard(heads, torch.zeros(2, 4)).shape == (0, 2)


def test_figures_take_the_best_head_of_each_class_and_the_mean_of_all():
    mask = torch.tensor([[1, 2], [1, 0]])
    found = trivial(TRIVIAL["whole image"], Truth(torch.empty(0, 4), mask), [0.6])
    two_heads = torch.cat([found.regions[0.6], torch.tensor([[[True, False], [True, False]]])])
    figures = figures_of(type(found)(found.boxes, {0.6: two_heads}), Truth(torch.empty(0, 4), mask))
    # class 1: 2/4 and 2/2; class 2: 1/4 and 0/3
    assert figures == {"Jaccard 0.6, best head": (1 + 1 / 4) / 2, "Jaccard 0.6, mean": (0.5 + 1 + 0.25 + 0) / 4}


@pytest.mark.parametrize("name", ["ViTModel", "Dinov2WithRegistersModel"])
@pytest.mark.parametrize("cut", [False, True])
def test_cls_attention_is_the_eager_maps_row(name, cut):
    host = small_models.hf(name, name.replace("Model", "Config"))().eval()
    model = skipat_surgery.apply(host, skip=[2, 3]) if cut else host
    images, tower = torch.randn(2, 3, 32, 32), Tower.of(model)
    fused = read_last_block(tower, images).attention
    model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = model(images, output_attentions=True).attentions[-1]
    prefix = tower.num_special_tokens
    torch.testing.assert_close(fused, eager[:, :, 0, prefix:].unflatten(2, (4, 4)), atol=1e-6, rtol=1e-5)


def test_keys_are_those_of_the_projection():
    model = small_models.timm_model("vit_tiny_patch16_224")().eval()
    seen = []
    model.blocks[-1].attn.qkv.register_forward_hook(lambda module, args, out: seen.append(out))
    block = read_last_block(Tower.of(model), torch.randn(2, 3, 32, 32))
    expected = seen[-1].chunk(3, dim=-1)[1][:, 1:].detach()
    torch.testing.assert_close(block.keys.flatten(1, 2), expected, atol=1e-6, rtol=1e-5)


def test_a_model_without_a_prefix_token_has_keys_alone():
    tower = Tower.of(case_named("SiglipForImageClassification").model().float())
    block = read_last_block(tower, case_named("SiglipForImageClassification").images().float())
    assert block.attention is None
    assert block.keys.shape[1] * block.keys.shape[2] == tower.family.grid(tower.module)[0] ** 2


def test_a_last_block_that_is_skipped_is_refused():
    model = skipat_surgery.apply(small_models.hf("ViTModel", "ViTConfig")(), skip=[4, 5])
    with pytest.raises(ValueError, match="the last block, 5, is skipped"):
        check_last_block(Tower.of(model))


# Boxes


def keys_with(*objects: tuple[tuple[int, int, int, int], torch.Tensor]) -> torch.Tensor:
    """Dark keys, with rectangles (rows and columns, ends not in them) of others."""
    keys = DARK.repeat(*GRID, 1)
    for (top, bottom, left, right), key in objects:
        keys[top:bottom, left:right] = key
    return keys


def fractions(top: int, bottom: int, left: int, right: int) -> list[float]:
    return [left / GRID[1], top / GRID[0], right / GRID[1], bottom / GRID[0]]


ONE, SMALL, LARGE = (1, 4, 2, 6), (4, 6, 6, 8), (0, 3, 0, 4)


@pytest.mark.parametrize("find", [lost, tokencut])
def test_the_box_of_a_bright_object(find: Callable):
    assert find(keys_with((ONE, BRIGHT))).tolist() == pytest.approx(fractions(*ONE))


def test_losts_seed_is_of_the_smaller_of_two_objects():
    """It is alike to the fewest patches."""
    keys = keys_with((LARGE, torch.tensor([0.5, 0.2, 1.0])), (SMALL, torch.tensor([0.5, 0.2, -1.0])))
    assert lost(keys).tolist() == pytest.approx(fractions(*SMALL))


def test_the_box_holds_only_what_hangs_together_with_the_seed():
    """Two objects that are alike: both are found, and the box is around that of the first patch."""
    both = keys_with((LARGE, BRIGHT), (SMALL, BRIGHT))
    assert lost(both).tolist() == pytest.approx(fractions(*LARGE))


def lost_in_loops(keys: np.ndarray, k: int) -> set[int]:
    """The patches that LOST finds, one by one, before those that hang together are taken."""
    count = len(keys)
    product = [[float(keys[p] @ keys[q]) for q in range(count)] for p in range(count)]
    degree = [sum(value >= 0 for value in row) for row in product]
    seed = min(range(count), key=lambda p: (degree[p], p))
    few = sorted(range(count), key=lambda p: (degree[p], p))[:k]
    joined = [q for q in few if product[seed][q] >= 0]
    return {p for p in range(count) if sum(product[p][s] for s in joined) >= 0}


def box_in_loops(found: set[int], seed: int) -> list[float]:
    """The box around a patch and what is reached from it, side by side."""
    reached, new = {seed}, [seed]
    while new:
        row, column = divmod(new.pop(), GRID[1])
        for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            patch = r * GRID[1] + c
            if 0 <= c < GRID[1] and patch in found - reached:
                reached.add(patch)
                new.append(patch)
    rows, columns = zip(*(divmod(patch, GRID[1]) for patch in reached), strict=True)
    return fractions(min(rows), max(rows) + 1, min(columns), max(columns) + 1)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("k", [5, 100])
def test_lost_on_noise_is_the_papers_rules_in_loops(seed, k):
    keys = torch.randn(*GRID, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    flat = keys.flatten(0, 1).numpy()
    start = min(range(len(flat)), key=lambda p: (int((flat @ flat[p] >= 0).sum()), p))
    assert lost(keys, k).tolist() == pytest.approx(box_in_loops(lost_in_loops(flat, k), start))


@pytest.mark.parametrize("seed", range(8))
def test_tokencut_on_noise_is_scipys_generalised_eigenvector(seed):
    keys = torch.randn(*GRID, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    flat = keys.flatten(0, 1).numpy()
    flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    ties = np.where(flat @ flat.T >= 0.2, 1, 1e-5)
    degrees = np.diag(ties.sum(axis=1))
    y = scipy.linalg.eigh(degrees - ties, degrees, subset_by_index=[1, 1])[1][:, 0]
    start = int(np.abs(y).argmax())
    side = {p for p in range(len(y)) if (y[p] > y.mean()) == (y[start] > y.mean())}
    assert tokencut(keys).tolist() == pytest.approx(box_in_loops(side, start))


def test_keys_that_are_all_alike_are_one_object_until_they_are_centred():
    """As DINOv2's are: what they share decides nothing in the model, and all here."""
    alike = keys_with((ONE, BRIGHT)) + torch.tensor([0.0, 9.0, 0.0])
    for find in (lost, tokencut):
        assert find(alike).tolist() == [0, 0, 1, 1]
        assert find(centred(alike)).tolist() == pytest.approx(fractions(*ONE))


def test_corloc_counted_by_hand():
    box = torch.tensor([0.0, 0.0, 0.5, 1.0])
    exactly_half = Truth(torch.tensor([[0.9, 0.9, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]))  # 0 and 1/2
    less = Truth(torch.tensor([[0.0, 0.0, 1.0, 1.1], [0.25, 0.0, 0.75, 1.0]]))  # 0.5/1.1 and 1/3
    assert localised(box, exactly_half)
    assert not localised(box, less)
    images = [{"CorLoc LOST": 1.0}, {"CorLoc LOST": 0.0}, {"CorLoc LOST": 1.0}, {}]  # the last has no box
    found = Discovery.of({"model": images})
    assert found.rows == {"model": {"CorLoc LOST": pytest.approx(2 / 3)}}
    assert (found.with_boxes, found.with_masks) == (3, 0)


# Annotations

SIZE = (16, 12)
OBJECTS = {"a": [(9, 3, 15, 9, 0)], "b": [(0, 0, 4, 4, 1), (6, 2, 16, 12, 0)], "c": []}  # x1, y1, x2, y2, category
NAMES = ("cat", "dog")


def drawn(objects: list) -> np.ndarray:
    """The classes of pixels, from 1."""
    mask = np.zeros(SIZE[::-1], np.uint8)
    for left, top, right, bottom, category in objects:
        mask[top:bottom, left:right] = category + 1
    return mask


def save_pictures(folder: Path) -> None:
    folder.mkdir(parents=True)
    for index, name in enumerate(OBJECTS):
        PIL.Image.new("RGB", SIZE, (80 * index, 100, 200)).save(folder / f"{name}.png")


def as_voc(root: Path) -> Path:
    save_pictures(root / "JPEGImages")
    (root / "Annotations").mkdir()
    (root / "SegmentationClass").mkdir()
    for name, objects in OBJECTS.items():
        boxes = "".join(
            f"<object><name>{NAMES[c]}</name><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax>"
            f"<ymax>{y2}</ymax></bndbox></object>"
            for x1, y1, x2, y2, c in objects
        )
        size = f"<size><width>{SIZE[0]}</width><height>{SIZE[1]}</height></size>"
        (root / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.png</filename>{size}{boxes}</annotation>"
        )
        palette = PIL.Image.fromarray(drawn(objects), "P")
        palette.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
        palette.save(root / "SegmentationClass" / f"{name}.png")
    return root


def as_coco(root: Path) -> Path:
    save_pictures(root / "val2017")
    (root / "annotations").mkdir()
    images, annotations = [], []
    for number, (name, objects) in enumerate(OBJECTS.items()):
        images.append({"id": number, "file_name": f"{name}.png", "width": SIZE[0], "height": SIZE[1]})
        for x1, y1, x2, y2, c in objects:
            corners = [x1, y1, x2 - 1, y1, x2 - 1, y2 - 1, x1, y2 - 1]  # Pillow fills the last pixel too
            annotations.append(
                {"image_id": number, "bbox": [x1, y1, x2 - x1, y2 - y1], "category_id": c, "segmentation": [corners]}
            )
    file = root / "annotations" / "instances_val2017.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    return file


def as_parquet(root: Path, masks: bool = True, boxes: bool = True, xywh: bool = False) -> Path:
    save_pictures(root / "pictures")
    rows = {"image": [str(root / "pictures" / f"{name}.png") for name in OBJECTS]}
    features = {"image": Image()}
    if boxes:
        last = (lambda x1, y1, x2, y2: [x2 - x1, y2 - y1]) if xywh else (lambda x1, y1, x2, y2: [x2, y2])
        rows["boxes"] = [[[*o[:2], *last(*o[:4])] for o in objects] for objects in OBJECTS.values()]
        features["boxes"] = List(List(Value("float32")))
    if masks:
        rows["mask"] = [PIL.Image.fromarray(drawn(objects)) for objects in OBJECTS.values()]
        features["mask"] = Image()
    (root / "table").mkdir()
    Dataset.from_dict(rows, Features(features)).to_parquet(root / "table" / "data.parquet")
    return root / "table"


@pytest.mark.parametrize("write", [as_voc, as_coco, as_parquet])
def test_the_formats_give_the_same_boxes_masks_and_pictures(write, tmp_path):
    found = read_annotations(str(write(tmp_path / "data")))
    assert len(found) == len(OBJECTS)
    for each, (index, objects) in zip(found, enumerate(OBJECTS.values()), strict=True):
        picture = each.picture("RGB")
        assert picture.getpixel((0, 0)) == (80 * index, 100, 200)
        truth = each.truth(picture.size)
        expected = [[x1 / 16, y1 / 12, x2 / 16, y2 / 12] for x1, y1, x2, y2, _ in objects]
        torch.testing.assert_close(truth.boxes, torch.tensor(expected).view(-1, 4))
        assert truth.mask.tolist() == drawn(objects).tolist()


def test_boxes_are_those_of_the_mask_where_there_are_no_others(tmp_path):
    found = read_annotations(str(as_parquet(tmp_path / "data", boxes=False)))
    for each, objects in zip(found, OBJECTS.values(), strict=True):
        boxes = sorted(each.truth(SIZE).boxes.tolist())
        expected = sorted([[x1 / 16, y1 / 12, x2 / 16, y2 / 12] for x1, y1, x2, y2, _ in objects])
        np.testing.assert_allclose(boxes, expected, atol=1e-6)


def test_crowds_are_void_and_no_object(tmp_path):
    file = as_coco(tmp_path / "data")
    held = json.loads(file.read_text())
    runs = {"counts": [12 * 15, 12], "size": [12, 16]}  # column by column: the last one
    held["annotations"].append(
        {"image_id": 0, "bbox": [15, 0, 1, 12], "category_id": 1, "segmentation": runs, "iscrowd": 1}
    )
    file.write_text(json.dumps(held))
    truth = read_annotations(str(file))[0].truth(SIZE)
    expected = drawn(OBJECTS["a"]).astype(int)
    expected[:, 15] = -1
    assert truth.mask.tolist() == expected.tolist()
    assert len(truth.boxes) == 1


def test_boxes_of_a_corner_and_a_size(tmp_path):
    place = str(as_parquet(tmp_path / "data", xywh=True))
    found = read_annotations(place, Columns(box_format="xywh"))
    assert found[1].boxes.tolist() == [[0, 0, 4, 4], [6, 2, 16, 12]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "JPEGImages" / "b.png").unlink(), r"1 of the pictures .* are not there, such as b.png"),
        (lambda root: (root / "Annotations" / "b.xml").write_text("<annotation>"), "b.xml is no XML"),
    ],
)
def test_voc_that_is_broken(change, message, tmp_path):
    root = as_voc(tmp_path / "data")
    change(root)
    with pytest.raises(ValueError, match=message):
        read_annotations(str(root))


def test_a_list_of_vocs_is_a_split(tmp_path):
    root = as_voc(tmp_path / "data")
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "val.txt").write_text("b\nc\n")
    assert [len(each.boxes) for each in read_annotations(str(root), Columns(split="val"))] == [2, 0]
    with pytest.raises(ValueError, match=r"0 lists ImageSets/Main/test\.txt"):
        read_annotations(str(root), Columns(split="test"))


# The command


def save(model: torch.nn.Module, folder: Path, **processor: object) -> Path:
    made = transformers.BitImageProcessor(**processor)
    loading.from_transformers(model, made).save(model, folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path, Path]:
    """An untouched model, one that is cut, and one whose last block is."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    side = {"size": {"height": 32, "width": 32}, "do_center_crop": False}
    built = small_models.hf("Dinov2Model", "Dinov2Config")
    return (
        save(built(), folder / "teacher", **side),
        save(skipat_surgery.apply(built(), skip=[2, 3]), folder / "cut", **side),
        save(skipat_surgery.apply(built(), skip=[4, 5]), folder / "late", **side),
    )


def run(**given: object) -> None:
    discover.main([str(part) for key, value in given.items() for part in (f"--{key}", value)])


def test_the_command_writes_figures_and_a_picture(models, tmp_path, capsys):
    teacher, cut, _ = models
    run(model=cut, teacher=teacher, dataset=as_parquet(tmp_path / "data"), output_dir=tmp_path / "out", shown=2)
    held = json.loads((tmp_path / "out" / "discovery.json").read_text())
    assert list(held["rows"]) == ["whole image", "centred 70 %", "teacher", "model"]
    assert held["skip"] == {"teacher": [], "model": [2, 3]}
    assert (held["with_boxes"], held["with_masks"], held["unreadable"]) == (2, 2, 0)
    # whole image: 36 and 100 of 192 pixels, the second of IoU above a half; each class alone for Jaccard
    assert held["rows"]["whole image"]["CorLoc LOST"] == 0.5
    whole = (36 / 192 + (16 / 192 + 100 / 192) / 2) / 2
    assert held["rows"]["whole image"]["Jaccard 0.9, mean"] == pytest.approx(whole)
    said = capsys.readouterr().out
    assert all(f"{100 * figure:.1f}" in said for figure in held["rows"]["model"].values())
    assert PIL.Image.open(tmp_path / "out" / "attention.png").size[0] > 400


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": 2}, "the last block, 5, is skipped"),
        ({"teacher": 2}, "the last block, 5, is skipped"),
        ({"masks": False, "boxes": False}, "holds no boxes and no masks"),
        ({"box_format": "yxyx"}, "--box_format must be one of"),
        ({"mass": "0.6,1"}, "--mass takes shares between 0 and 1"),
        ({"xywh": True, "masks": False}, "end before they begin, read as xyxy: try --box_format xywh"),
        ({"image_size": 4}, "takes no images of 4 × 4"),
    ],
)
def test_what_is_refused_is_refused_before_the_work(given, message, models, tmp_path, capsys):
    table = {name: given.pop(name) for name in ("masks", "boxes", "xywh") if name in given}
    place = as_parquet(tmp_path / "data", **table)
    named = {name: models[index] for name, index in given.items() if name in ("model", "teacher")}
    options = {"model": models[1], "dataset": place, "output_dir": tmp_path / "out", **given, **named}
    with pytest.raises(SystemExit) as ending:
        run(**options)
    assert ending.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_picture_is_shown_whole_and_scaled_as_the_processor_does(tmp_path):
    """A processor that crops would cut what boxes are around."""
    model = small_models.hf("Dinov2Model", "Dinov2Config")()
    noise = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    plain = transformers.BitImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    host = loading.from_transformers(model, plain)
    torch.testing.assert_close(WholeImages(host)([noise]), host.preprocess([noise]), atol=1e-6, rtol=1e-5)
    cropping = transformers.BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    wide = PIL.Image.new("RGB", (64, 32), "black")
    wide.paste("white", (0, 0, 8, 32))  # which a crop of the middle would lose
    made = WholeImages(loading.from_transformers(model, cropping))([wide])
    assert made.shape == (1, 3, 32, 32)
    assert made[0, 0, 16].argmax() < 4
    assert made[0, 0, 16, :3].min() > made[0, 0, 16, 6:].max()
