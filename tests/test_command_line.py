"""The commands as users meet them: refused before the work, said in one line, and shown on every terminal."""

from __future__ import annotations

import io
import json
import pickle
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import PIL.Image
import pytest
import small_models
import timm
import torch
import transformers
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

import skipat_surgery
from skipat_surgery.commands import analyze, benchmark, checks, digits, distill, images, loading, machine, sources
from skipat_surgery.commands.options import parse, parse_numbers, parse_skip
from skipat_surgery.terminal import spell_out

ROOT = Path(__file__).parents[1]
COMMANDS = {"distill": distill, "analyze": analyze, "benchmark": benchmark}
SIDE = {"height": 16, "width": 16}


pytestmark = pytest.mark.usefixtures("fresh_process")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A classifier of the digits' ten classes, with random weights."""
    torch.manual_seed(0)
    built = small_models.hf("ViTForImageClassification", "ViTConfig", image_size=16, patch_size=4, num_labels=10)()
    folder = tmp_path_factory.mktemp("model")
    loading.from_transformers(built, transformers.ViTImageProcessor(size=SIDE)).save(built, folder)
    return folder


SHORT = {
    "distill": {"skip": "2-3", "solve_images": 0, "max_steps": 0, "batch_size": 225},
    "analyze": {"n_skip": 1, "num_images": 256, "batch_size": 64, "expansions": 0.25},
    "benchmark": {"skip": "2-3", "image_sizes": 16, "dtypes": "fp32", "rounds": 5, "batch_size": 2, "memory": False},
}


def run(name: str, **given: object) -> None:
    options = {**SHORT[name], **given}
    COMMANDS[name].main([str(part) for key, value in options.items() for part in (f"--{key}", value)])


@dataclass
class Said:
    """What a command said before it ended."""

    code: int
    line: str


@pytest.fixture
def ended(model, tmp_path, capsys) -> Callable[..., Said]:
    """Run a command that must end in one line, and say nothing else on stderr."""

    def end(name: str, **given: object) -> Said:
        with pytest.raises(SystemExit) as ending:
            run(name, **{"model": model, "output_dir": tmp_path / "run", **given})
        line = capsys.readouterr().err.strip()
        assert line.startswith(f"{name}.py: "), line
        return Said(ending.value.code, line)

    return end


@pytest.fixture
def refused(ended, tmp_path) -> Callable[..., None]:
    """Run a command that must be refused before its work, with this message and nothing written."""

    def refuse(name: str, message: str, **given: object) -> None:
        before = sorted(tmp_path.rglob("*"))
        said = ended(name, **given)
        assert message in said.line
        assert said.code == 2
        assert "\n" not in said.line
        assert sorted(tmp_path.rglob("*")) == before

    return refuse


@pytest.mark.parametrize("name", COMMANDS)
def test_what_cannot_be_understood(name, refused):
    refused(name, "unknown arguments ['--modle', 'x']; see --help", modle="x")
    refused(name, "invalid int value: 'many'; see --help", batch_size="many")
    refused(name, "--batch_size must be at least 1" if name != "distill" else "batch_size must be", batch_size=0)


@pytest.mark.parametrize("name", ["distill", "benchmark"])
@pytest.mark.parametrize("skip", ["3-", "-3", "3--5", "3-4-5", "2,,3", "2,", "", "two", "2.5", "3-99999999999"])
def test_ranges_that_are_none(name, skip, refused):
    refused(name, f"--skip must be of the form 3-8 or 2,4-6, got {skip!r}", skip=skip)


def test_a_range_backwards(refused):
    refused("distill", "--skip must name the lower block of a range first, as in 2-4, got '1,4-2'", skip="1,4-2")


def test_ranges():
    assert parse_skip("2,4-6") == parse_skip(" 2, 4 - 6 ") == [2, 4, 5, 6]
    assert parse_skip("3-3") == [3]
    assert parse_numbers("0.25,2", float, "expansions") == [0.25, 2.0]


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_that_cannot_be_written(name, refused, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    refused(name, f"cannot be made: {tmp_path / 'file'} is a file", output_dir=tmp_path / "file")
    refused(name, f"cannot be made: {tmp_path / 'file'} is a file", output_dir=tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "mine"

    def read_only(dir: Path) -> None:
        assert dir == tmp_path
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    refused(name, "cannot be written: Permission denied; choose another")


@pytest.mark.parametrize("name", ["distill", "analyze"])
def test_without_matplotlib(name, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(name, "pictures need matplotlib, which skipat-surgery brings: pip install matplotlib")


@pytest.mark.parametrize("name", ["distill", "analyze"])
def test_without_scikit_learn(name, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    refused(name, "the digits need scikit-learn: pip install 'skipat-surgery[demo]'")


@pytest.mark.parametrize(
    ("tracker", "package"),
    [("tensorboard", "'skipat-surgery[trackers]'"), ("wandb", "wandb"), ("comet_ml", "comet-ml")],
)
def test_without_the_package_of_a_tracker(tracker, package, refused, monkeypatch):
    monkeypatch.setattr(checks, "get_available_trackers", lambda: [])
    refused(
        "distill",
        f"--report_to {tracker} needs a package that is not installed: pip install {package}",
        report_to=tracker,
    )


def test_a_tracker_that_nobody_knows(refused):
    refused("distill", "--report_to takes ['aim', 'all', ", report_to="paper")


BROKEN = {"cut short": '{"model_type": "vit"', "no object": "[1]", "no text": "\xff"}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_config_is_named(name, text, refused, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text(text, encoding="latin-1")
    refused(name, str(tmp_path / "broken"), model=tmp_path / "broken")


def copy_of(model: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("name", ["distill", "analyze"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "preprocessor_config.json"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: None], ids=["half", "missing"])
def test_a_checkpoint_with_a_broken_file_is_named(name, file, damage, model, refused, tmp_path):
    broken = copy_of(model, tmp_path / "broken")
    left = damage((broken / file).read_bytes())
    (broken / file).unlink()
    if left is not None:
        (broken / file).write_bytes(left)
    refused(name, str(broken), model=broken)


@pytest.mark.parametrize("name", ["distill", "analyze"])
def test_weights_that_are_not_finite_are_named(name, model, refused, tmp_path):
    broken = copy_of(model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["classifier.bias"][3] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    refused(name, "1 of its tensors hold NaN or infinity, the first of them classifier.bias", model=broken)


def test_a_run_whose_settings_are_broken(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{")
    refused("distill", f"{tmp_path / 'run' / 'run.json'} is no JSON", resume=True)


def test_what_only_the_analysis_knows(model, refused, tmp_path):
    refused("analyze", "give exactly one of speedup, n_skip and max_kl", speedup=1.1)
    refused("analyze", "n_skip must be from 1 to 5 for 6 blocks, got 6", n_skip=6)
    refused("analyze", "--expansions takes numbers above 0 with commas between them, got 'wide'", expansions="wide")
    refused("analyze", "--batch_size must be at least 4, got 2", batch_size=2)


def test_what_only_the_benchmark_knows(refused):
    refused("benchmark", "skip names [6], but", skip="5-6")
    refused("benchmark", "--image_sizes takes numbers above 0 with commas between them, got '16,'", image_sizes="16,")
    refused("benchmark", "--dtypes takes ['bf16', 'fp16', 'fp32'], got ['int4']", dtypes="int4")
    refused("benchmark", "device type at start of device string: nowhere", device="nowhere")
    refused("benchmark", "--device mps cannot be used here: ", device="mps")


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_rates_that_are_none(value, refused):
    refused("distill", f"learning_rate must be positive and finite, got {float(value)}", learning_rate=value)


@dataclass(frozen=True)
class Options:
    skip: str = "3-8"
    mixed_precision: str | None = None
    compile: bool = True
    rate: float = 1.0
    report_to: list[str] = field(default_factory=list)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("skip: 6", Options(skip="6")),
        ("skip: 2,4-6", Options(skip="2,4-6")),
        ("skip: [3, 4]", Options(skip="3,4")),
        ("mixed_precision: no", Options(mixed_precision="no")),
        ("mixed_precision: null", Options()),
        ("mixed_precision:", Options()),
        ("compile: no", Options(compile=False)),
        ("rate: 1e-3", Options(rate=0.001)),
        ("report_to: tensorboard", Options(report_to=["tensorboard"])),
        ("report_to: [wandb, tensorboard]\ncompile: false", Options(compile=False, report_to=["wandb", "tensorboard"])),
        ("", Options()),
    ],
)
def test_a_yaml_file_means_what_its_text_means_on_the_command_line(text, expected, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(text, encoding="utf-8")
    assert parse((Options,), [str(file)], "") == (expected,)
    assert parse((Options,), [str(file), "--skip", "1"], "")[0].skip == "1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate: fast", "argument --rate: invalid float value: 'fast'"),
        ("compile: perhaps", "argument --compile"),
        ("skip: {3: 4}", r"settings.yaml: skip must have one value or a list of values"),
        ("skip: [", r"settings.yaml is no YAML"),
        ("just words", r"settings.yaml must hold lines of the form 'argument: value'"),
        ("\x00", r"settings.yaml is no YAML"),
    ],
)
def test_a_yaml_file_that_is_none(text, message, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse((Options,), [str(file)], "")


def pictures(folder: Path, *paths: str) -> Path:
    draw = np.random.default_rng(0)
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / path)
    return folder


BAD_DATA = [
    (["0.png"], {}, "has one image, and one split"),
    (["cat/0.png", "dog/0.png"], {}, "only the data set has cat, dog, only the model zero, one"),
    (["zero/0.png", "one/0.png", "one/1.png"], {"label_column": "class"}, "has no column 'class'"),
    (["zero/0.png", "one/0.png"], {"train_split": "rest"}, "has no split 'rest'; it has ['train']"),
    (["train/a/0.png", "test/a/0.png", "rest/a/0.png"], {}, "folders test, train are splits, and beside them"),
    (["0.png", "1.png"], {"label_weight": 1}, "label_weight needs a model with classes and a data set with labels"),
]


@pytest.mark.parametrize(("paths", "given", "message"), BAD_DATA, ids=[message for *_, message in BAD_DATA])
def test_data_that_cannot_be_used(paths, given, message, model, refused, tmp_path):
    named = copy_of(model, tmp_path / "named")
    config = json.loads((named / "config.json").read_text())
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    config["id2label"] = dict(enumerate(words))
    (named / "config.json").write_text(json.dumps(config))
    refused("distill", message, model=named, dataset=pictures(tmp_path / "data", *paths), **given)


@pytest.mark.parametrize("kind", ["timm", "transformers"])
@pytest.mark.parametrize("name", ["distill", "analyze"])
def test_a_model_that_takes_no_pictures(name, kind, refused, tmp_path):
    if kind == "timm":
        built = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, depth=5, in_chans=4)
        loading.timm_model.save(built, tmp_path / "model")
    else:
        built = small_models.hf("ViTForImageClassification", "ViTConfig", image_size=16, num_channels=4)()
        built.save_pretrained(tmp_path / "model")
        transformers.ViTImageProcessor(size=SIDE).save_pretrained(tmp_path / "model")
    refused(name, "the model takes images of 4 channels, and pictures give 1 or 3", model=tmp_path / "model")


@pytest.mark.usefixtures("without_reloading")
@pytest.mark.parametrize("name", ["distill", "analyze"])
def test_what_was_found_is_said_before_the_work(name, model, tmp_path, capsys):
    data = pictures(tmp_path / "data [1]", *(f"{split}/{n}.png" for split in ("train", "test") for n in range(40)))
    (data / "train" / "notes.txt").touch()
    extra = {"num_images": 40, "batch_size": 10} if name == "analyze" else {}
    run(name, model=model, dataset=data, output_dir=tmp_path / "run", **extra)
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [
        f"Data: {data}, a folder of images",
        "  train: 40 images in column 'image', no labels ("
        + ("none wanted)" if name == "analyze" else "no folders of classes)"),
        said[2],
    ]
    assert "  Files: 80 found, 80 used" in said
    assert "  WARNING: 1 files are not used, as they are no images: 1 .txt; the first is train/notes.txt" in said


@pytest.fixture
def without_reloading(monkeypatch):
    """A reload is a new process, which takes seconds and is not what is tested here."""
    monkeypatch.setattr(distill, "difference_after_reload", lambda *args: 0.0)


SHOWN = {
    "distill": ["MSA ⇒ Φ", "3×3", "agre…"],
    "analyze": ["clusters of side 2", "divergence"],
    "benchmark": ["cut, the paper's Φ", "1.00× (1.00–1.00)"],
}


@pytest.mark.usefixtures("without_reloading")
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_tables_print_on_a_terminal_that_is_not_utf8(name, encoding, model, tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    monkeypatch.setenv("COLUMNS", "60")  # too narrow for a table, whose words end in an ellipsis then
    extra = {"expansions": "paper"} if name == "benchmark" else {}
    run(name, model=model, output_dir=tmp_path / "run", **extra)
    terminal.flush()
    shown = terminal.buffer.getvalue().decode(encoding)
    for words in SHOWN[name]:
        assert spell_out(words, encoding) in shown


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", "Phi => 4x4 - ~ ? ?"),
        ("cp1252", "Phi => 4×4 – … ? ?"),
        ("utf-8", "Φ ⇒ 4×4 – … 猫 ?"),  # the last is half of a character, as in names of files that are no UTF-8
    ],
)
def test_what_an_encoding_lacks_is_spelled_out(encoding, expected):
    assert spell_out("Φ ⇒ 4×4 – … 猫 \udc80", encoding) == expected


def test_a_result_prints_on_a_terminal_that_is_not_utf8(vit, monkeypatch):
    found = skipat_surgery.report(skipat_surgery.apply(vit, [2, 3]))
    assert "MSA ⇒ Φ" in str(found)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    print(found)
    lines = str(found).splitlines()
    assert "MSA => Phi" in lines[2]
    assert len({len(line) for line in lines[1:-1]}) == 1  # what is spelled out stays in line


def interrupt(*args: object) -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("without_reloading")
def test_an_interrupted_run_says_how_to_go_on(ended, tmp_path, model, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(distill, "freeze_untouched", interrupt)
        said = ended("distill")
    assert said == Said(130, "distill.py: interrupted; the same command with --resume goes on with it")
    assert not (tmp_path / "run" / "results.json").exists()
    run("distill", model=model, output_dir=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupt_before_the_work(name, ended, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "build" if name == "benchmark" else "load", interrupt)
    said = ended(name)
    assert said == Said(130, f"{name}.py: interrupted before the work began, nothing was written")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(28, "No space left"),
            "error: [Errno 28] No space left; the same command with --resume goes on with it",
        ),
        (FloatingPointError("the loss is nan"), "error: the loss is nan"),
    ],
)
def test_work_that_fails_says_so_in_one_line(error, line, ended, monkeypatch):
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(distill, "freeze_untouched", fail)
    assert ended("distill") == Said(1, f"distill.py: {line}")


def test_a_fault_of_ours_keeps_its_traceback(model, tmp_path, monkeypatch):
    def fail(*args: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(distill, "freeze_untouched", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        run("distill", model=model, output_dir=tmp_path / "run")


@pytest.mark.usefixtures("without_reloading")
def test_no_network_at_the_push(ended, refused, tmp_path, monkeypatch):
    given = {"push_to_hub": True, "hub_model_id": "founder/digits"}
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_test")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("distill", "push_to_hub needs the network, and HF_HUB_OFFLINE is set", **given)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    said = ended("distill", **given)
    best = tmp_path / "run" / "best"
    assert said.code == 1
    assert "the work is done and kept, but pushing to founder/digits failed: nothing was created" in said.line
    assert said.line.endswith(f"Push it later by: hf upload founder/digits {best}")
    assert (best / "model.safetensors").exists()
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 0


def timm_model() -> loading.LoadedModel:
    torch.manual_seed(0)
    return loading.from_timm(timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, depth=1))


@pytest.mark.parametrize("host", ["transformers", "timm"])
def test_workers_that_are_spawned_load_the_same_images(host, model):
    loaded = timm_model() if host == "timm" else loading.load(str(model))
    data = sources.load_data(digits.NAME, None)
    crop = images.training_crop(loaded.image_size, 0.5)
    items = images.ImageItems(data.train.select(range(6)), "image", "label", "RGB", augment=crop, seed=3)
    collate = images.Collate(loaded.preprocess, loaded.image_mode, loaded.image_size)
    here = list(DataLoader(items, 3, collate_fn=collate))
    if host == "timm":  # one of the two in truth, as a spawned process takes seconds
        there = list(DataLoader(items, 3, collate_fn=collate, num_workers=1, multiprocessing_context="spawn"))
    else:
        sent = pickle.loads(pickle.dumps((items, collate)))
        there = list(DataLoader(sent[0], 3, collate_fn=sent[1]))
    assert [batch.keys() for batch in here] == [batch.keys() for batch in there]
    for batch, other in zip(here, there, strict=True):
        assert all(torch.equal(batch[name], other[name]) for name in batch)


@pytest.mark.usefixtures("without_reloading")
@pytest.mark.parametrize("name", ["distill", "analyze"])
@pytest.mark.parametrize(("asked", "said"), [("bf16", 1), ("no", 0)])
def test_bf16_on_a_cpu_without_it_is_warned_of(name, asked, said, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "multiplies_bf16", lambda device: False)
    run(name, model=model, output_dir=tmp_path / "run", mixed_precision=asked)
    assert capsys.readouterr().out.count("WARNING: this CPU has no bfloat16") == said


@pytest.mark.parametrize(("has", "taken"), [(True, "bf16"), (False, "fp32")])
def test_a_benchmark_is_in_bf16_where_there_is_one(has, taken, monkeypatch):
    monkeypatch.setattr(machine, "multiplies_bf16", lambda device: has)
    assert benchmark.Arguments().precisions == [taken]
    assert benchmark.Arguments(dtypes="fp32,bf16").precisions == ["fp32", "bf16"]


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_a_launch_that_shares_a_model_out_is_refused(kind):
    given = SimpleNamespace(distributed_type=DistributedType[kind])
    with pytest.raises(ValueError, match=rf"launched with {kind}, which shares a model out.*recipes/configs/ddp.yaml"):
        checks.check_whole_copies(given)


@pytest.mark.parametrize(("name", "machines", "processes"), [("ddp", 1, 8), ("ddp_nodes", 8, 64)])
def test_accelerate_reads_its_configurations(name, machines, processes):
    found = load_config_from_file(str(ROOT / f"recipes/configs/{name}.yaml"))
    assert (found.num_machines, found.num_processes) == (machines, processes)
    assert found.distributed_type == DistributedType.MULTI_GPU
    for whole in ("NO", "MULTI_CPU", "MULTI_GPU"):
        checks.check_whole_copies(SimpleNamespace(distributed_type=DistributedType[whole]))
