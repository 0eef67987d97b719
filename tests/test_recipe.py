"""`recipes/distill.py` as users run it: by `accelerate launch`, on real images, killed and resumed, on bad input."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import platform
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import psutil
import pytest
import timm
import torch
from figures import colours
from hub_server import Hub
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, ViTConfig, ViTImageProcessor, ViTModel

import skipat_surgery
from skipat_surgery import PhiConfig
from skipat_surgery.commands import digits, loading
from skipat_surgery.commands.distill import Arguments, repository
from skipat_surgery.commands.options import parse, parse_cut
from skipat_surgery.commands.presets import PRESETS, teacher_steps
from skipat_surgery.convert.settings import TrainingConfig

ROOT = Path(__file__).parents[1]
ACCELERATE = Path(sys.executable).with_name("accelerate")
ON_CPU = {**os.environ, "ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}
SHORT = {
    "skip": "3-5",
    "solve_images": 256,
    "align_steps": 2,
    "max_steps": 6,
    "batch_size": 16,
    "warmup_steps": 1,
    "eval_steps": 3,
    "eval_images": 64,
    "checkpoint_steps": 2,
    "log_steps": 2,
    "rate_scale": 1.0,
}


def command(output: Path, processes: int = 1, **arguments: object) -> list[str]:
    launch = [
        str(ACCELERATE),
        "launch",
        "--cpu",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    launch += ["--num_processes", "1"]
    if processes > 1:  # accelerate starts one on CPUs, whatever it is told
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    options = {**SHORT, "output_dir": output, **arguments}
    given = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    return [*launch, str(ROOT / "recipes" / "distill.py"), *given]


def launch(output: Path, processes: int = 1, **arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(output, processes, **arguments),
        cwd=ROOT,
        env=ON_CPU,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


def script(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    given = [sys.executable, str(ROOT / name), *options]
    return subprocess.run(given, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)


def results(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


@pytest.fixture(scope="module")
def teacher(once) -> Path:
    """A small ViT trained on the digits: enough to have opinions."""

    def train(folder: Path) -> None:
        host = digits.train_teacher(steps=60)
        host.save(host.model, folder)

    return once("teacher", train)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory) -> Path:
    """The digits as a folder of images; among them grayscale, RGBA and palette ones, and two that are corrupt."""
    folder = tmp_path_factory.mktemp("folder")
    for split, rows in digits.load_digits().items():
        for index in range(180 if split == "train" else 41):  # 41: the last batch is uneven
            row = rows[index]
            place = folder / split / str(row["label"])
            place.mkdir(parents=True, exist_ok=True)
            image = row["image"].convert(["L", "RGBA", "P", "RGB"][index % 4])
            image.save(place / f"{index}.png")
    for split in ("train", "test"):
        next((folder / split / "3").glob("*.png")).write_bytes(b"not an image")
    return folder


@pytest.fixture(scope="module")
def whole_run(teacher, once) -> Path:
    """One unbroken run on the digits."""

    def run(folder: Path) -> None:
        done = launch(folder / "run", model=teacher)
        assert done.returncode == 0, done.stderr

    return once("whole_run", run) / "run"


def test_it_writes_what_it_says(whole_run):
    found = results(whole_run)
    assert found["reload_difference"] < 1e-5
    assert list(found["rows"]) == ["teacher", "cut", "solved", "aligned", "distilled"]
    for row in found["rows"].values():
        assert {"top1", "agreement", "parameters", "gflops", "images_per_second"} <= set(row)
    assert found["rows"]["distilled"]["images"] == 450
    assert colours(whole_run / "curve.png") > 20
    card = (whole_run / "last" / "README.md").read_text()
    assert f"{100 * found['rows']['distilled']['agreement']:.2f}" in card
    assert "arxiv.org/abs/2301.02240" in card
    model = AutoModelForImageClassification.from_pretrained(whole_run / "last")
    assert type(model).__name__ == "SkipatViTForImageClassification"
    skipped = [index for index, layer in enumerate(model.vit.layers) if hasattr(layer, "phi")]
    assert skipped == [3, 4, 5]


def test_its_figures_are_true(whole_run, teacher):
    """Agreement and top-1, measured again by a few plain lines."""
    data = digits.load_digits()["test"]
    student, original = loading.load(str(whole_run / "last")), loading.load(str(teacher))
    pixels = student.preprocess([image.convert("RGB") for image in data["image"]])
    with torch.no_grad():
        found, expected = (host.model(pixels).logits.argmax(dim=-1) for host in (student, original))
    row = results(whole_run)["rows"]["distilled"]
    assert row["agreement"] == pytest.approx((found == expected).float().mean().item(), abs=1e-6)
    assert row["top1"] == pytest.approx((found == torch.tensor(data["label"])).float().mean().item(), abs=1e-6)


def test_two_runs_with_one_seed_are_equal_and_another_seed_is_not(whole_run, teacher, tmp_path):
    assert launch(tmp_path / "again", model=teacher).returncode == 0
    assert launch(tmp_path / "other", model=teacher, seed=1).returncode == 0
    first, again, other = (
        load_file(path / "last" / "model.safetensors") for path in (whole_run, tmp_path / "again", tmp_path / "other")
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_resumes_to_the_same_weights(processes, teacher, tmp_path):
    settings = {"model": teacher, "ema_decay": 0.9, "mixup": 0.5, "gradient_accumulation_steps": 2, "max_steps": 8}
    assert launch(tmp_path / "whole", processes, **settings).returncode == 0
    broken = tmp_path / "broken"
    victim = subprocess.Popen(
        command(broken, processes, **settings),
        cwd=ROOT,
        env=ON_CPU,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list((broken / "checkpoints").glob("step-00000004")):
        assert victim.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    for process in (*psutil.Process(victim.pid).children(recursive=True), victim):
        process.kill()
    victim.wait()
    assert not (broken / "results.json").exists()
    # What a kill in the middle of writing leaves behind must not be picked up.
    (broken / "checkpoints" / "step-00000099.unfinished").mkdir()
    changed = run_in_process(broken, resume=True, **{**settings, "learning_rate": 1.0})
    assert changed.returncode == 2
    assert "cannot be resumed with other settings: learning_rate was 0.001, now 1.0" in changed.stderr
    done = launch(broken, processes, resume=True, **settings)
    assert done.returncode == 0, done.stderr
    assert "Resuming from" in done.stdout
    whole, resumed = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("whole", "broken"))
    assert whole.keys() == resumed.keys()
    for name, weight in whole.items():
        assert torch.equal(weight, resumed[name]), name
    drop_times = [
        [{k: v for k, v in point.items() if k != "seconds"} for point in results(tmp_path / name)["history"]]
        for name in ("whole", "broken")
    ]
    assert drop_times[0] == drop_times[1]


def test_two_processes_count_every_image_once_and_one_writes(teacher, image_folder, tmp_path):
    done = launch(tmp_path / "run", 2, model=teacher, dataset=image_folder, batch_size=8)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "run")["processes"] == 2
    row = results(tmp_path / "run")["rows"]["distilled"]
    assert (row["images"], row["corrupt"]) == (40, 1)
    assert done.stdout.count("Checkpoint:") == 1


def test_grayscale_rgba_palette_and_corrupt_images(teacher, image_folder, tmp_path):
    done = launch(tmp_path / "run", model=teacher, dataset=image_folder, max_steps=12)
    assert done.returncode == 0, done.stderr
    # 12 steps of 16 images go once through the 180, and begin again: the corrupt one is met once or twice.
    assert "Left out as unreadable: 1 evaluation images, training images " in done.stdout
    assert results(tmp_path / "run")["corrupt_in_training"] in (1, 2)
    assert results(tmp_path / "run")["rows"]["distilled"]["images"] == 40


def test_a_yaml_file_and_overrides_and_a_push(teacher, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        f"model: {teacher}\nskip: 4-6\nmax_steps: 2\nsolve_images: 0\nlabel_column: none\n"
        "push_to_hub: true\nhub_model_id: founder/digits\n"
    )
    launcher = command(tmp_path)[: command(tmp_path).index(str(ROOT / "recipes" / "distill.py")) + 1]
    given = [str(settings), "--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--eval_images", "32"]
    with Hub() as hub:
        environment = hub.environment(tmp_path / "home")
        done = subprocess.run(
            [*launcher, *given], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        pushed = hub.repos["founder/digits"]
    found = results(tmp_path / "run")
    assert (found["skip"], found["steps"]) == ("4-6", 1)
    assert pushed["model.safetensors"] == (tmp_path / "run" / "best" / "model.safetensors").read_bytes()
    assert json.loads(pushed["config.json"])["skipat"]["results"]["steps"] == 1
    assert "distilled (1 steps)" in pushed["README.md"].decode()
    settings.write_text("modle: x\n")
    done = subprocess.run([*launcher, *given], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "unknown arguments ['modle']" in done.stderr


def test_a_backbone_without_classes_learns_from_features(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 64}
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    host = loading.from_transformers(ViTModel(ViTConfig(**shape, image_size=16, patch_size=4)), processor)
    host.save(host.model, tmp_path / "teacher")
    done = launch(tmp_path / "run", 2, model=tmp_path / "teacher", skip="2-4")
    assert done.returncode == 0, done.stderr
    row = results(tmp_path / "run")["rows"]["distilled"]
    assert {"prefix_cosine", "patch_cosine"} <= set(row)
    assert "agreement" not in row


def test_a_timm_model_built_and_trained_here_is_saved_and_reloaded(tmp_path):
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 8, "num_heads": 4, "mlp_ratio": 2.0}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **shape)
    host = loading.from_timm(model)
    rows = digits.load_digits()
    train, test = (host.preprocess([i.convert("RGB") for i in rows[split]["image"]]) for split in ("train", "test"))
    digits.fit(model, train, torch.tensor(rows["train"]["label"]), steps=80)
    host.save(model, tmp_path / "teacher")
    only_z = {"prefix": "mix", "pool": 0, "reads_x": False}  # the default starts where this teacher is
    done = launch(tmp_path / "run", model=tmp_path / "teacher", skip="3-5", max_steps=20, eval_steps=20, **only_z)
    assert done.returncode == 0, done.stderr
    found = results(tmp_path / "run")
    assert found["host"] == "timm"
    assert found["reload_difference"] < 1e-5
    student = timm.create_model(f"local-dir:{tmp_path / 'run' / 'last'}", pretrained=True).eval()
    assert [index for index, block in enumerate(student.blocks) if hasattr(block, "phi")] == [3, 4, 5]
    with torch.no_grad():
        agreement = (student(test).argmax(dim=-1) == model(test).argmax(dim=-1)).float().mean().item()
    assert agreement == pytest.approx(found["rows"]["distilled"]["agreement"], abs=1e-6)
    assert found["rows"]["distilled"]["kl"] < 0.8 * found["rows"]["cut"]["kl"]


BAD = [
    ({"skip": "3-99"}, r"skip names [12, 13"),
    ({"skip": "0-3"}, "block 0 cannot be skipped"),
    ({"skip": "three"}, "--skip must be of the form 3-8 or 2,4-6, got 'three'"),
    ({"expansion": 0.01}, "expansion must be from 0.125 to 64"),
    ({"solve_images": 9, "prefix": "mix"}, "9 images are too few to solve Φ of width 64: give at least 129"),
    ({"max_steps": -1}, "max_steps must not be negative, got -1; 0 leaves the distillation out"),
    ({"label_weight": 1, "mixup": 0.5}, "set label_weight or mixup to 0"),
    ({"label_weight": 1, "label_column": "none"}, "label_weight needs a model with classes and a data set with labels"),
    ({"model": "/nowhere/at/all"}, "/nowhere/at/all"),
    ({"dataset": "/nowhere/at/all"}, "/nowhere/at/all cannot be read as a data set"),
]


def run_in_process(output: Path, **arguments: object) -> subprocess.CompletedProcess[str]:
    """The recipe without the launcher, which only costs time where nothing is trained."""
    given = [
        str(part)
        for name, value in {**SHORT, "output_dir": output, **arguments}.items()
        for part in (f"--{name}", value)
    ]
    recipe = [sys.executable, str(ROOT / "recipes" / "distill.py")]
    return subprocess.run([*recipe, *given], cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)


def refused(output: Path, message: str, **arguments: object) -> None:
    done = run_in_process(output, **arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not output.exists()


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_refused_and_nothing_is_written(arguments, message, teacher, image_folder, tmp_path):
    refused(tmp_path / "run", message, **{"model": teacher, "dataset": image_folder, **arguments})


def test_a_data_set_without_images_is_refused(teacher, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    (text / "train.csv").write_text("a,b\n1,2\n3,4\n")
    refused(tmp_path / "run", "has no column of images", model=teacher, dataset=text)


def test_class_counts_that_differ_are_refused_with_what_to_do(teacher, tmp_path):
    for label in "abc":
        (tmp_path / "data" / "train" / label).mkdir(parents=True)
        for index in range(10):
            pixels = np.random.default_rng(index).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / "train" / label / f"{index}.png")
    wrong = {"model": teacher, "dataset": tmp_path / "data"}
    refused(tmp_path / "run", "the model has 10 classes and", **wrong)
    refused(tmp_path / "run", "Pass --label_column none to distil without labels", **wrong)


def test_an_output_directory_that_holds_a_run_is_refused(whole_run, teacher):
    before = {path: path.stat().st_mtime for path in whole_run.rglob("*")}
    done = run_in_process(whole_run, model=teacher)
    assert done.returncode == 2
    assert "already holds a run: go on with it by --resume, or choose another --output_dir" in done.stderr
    assert {path: path.stat().st_mtime for path in whole_run.rglob("*")} == before


def test_stages_can_be_left_out(teacher, tmp_path):
    done = launch(tmp_path / "run", model=teacher, max_steps=0, align_steps=0)
    assert done.returncode == 0, done.stderr
    found = results(tmp_path / "run")
    assert list(found["rows"]) == ["teacher", "cut", "solved"]
    assert found["rows"]["solved"]["kl"] < 0.8 * found["rows"]["cut"]["kl"]
    assert found["reload_difference"] < 1e-5
    card = (tmp_path / "run" / "last" / "README.md").read_text()
    assert f"{100 * found['rows']['solved']['agreement']:.2f}" in card


def test_which_blocks_to_skip(teacher, tmp_path):
    """`recipes/analyze.py`: pictures and figures, and a plan that the distillation takes as it is printed."""
    options = ["--model", str(teacher), "--n_skip", "3", "--num_images", "512", "--batch_size", "64", "--max_run", "1"]
    done = script("recipes/analyze.py", *options, "--output_dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "analysis.json").read_text())
    chosen = found["plan"]["chosen"]["choice"]["phi"]
    assert len(chosen) == 3
    assert found["plan"]["images"] == [384, 128]
    assert len(found["cka"]["msa"]) == 12
    for picture in ("cka.png", "frontier.png"):
        assert colours(tmp_path / picture) > 20
    file = "".join(done.stdout.split("--plan")[1].split("Pictures")[0].split())  # the console breaks long lines
    assert file == str(tmp_path / "plan.json")
    cut = parse_cut(argparse.Namespace(plan=file))
    assert {str(index): dataclasses.asdict(phi) for index, phi in cut.phi.items()} == chosen
    with pytest.raises(ValueError, match=r"--plan takes a plan.json of .*: .* holds no plan"):
        parse_cut(argparse.Namespace(plan=tmp_path / "analysis.json"))


def test_the_ablation_trains_rows_and_goes_on_where_it_was(teacher, tmp_path):
    (tmp_path / "ablation.json").write_text(json.dumps({"Z = 0": [{"agreement": 0.125, "seconds": 1.0}]}))
    options = ["--model", str(teacher), "--max_steps", "2", "--test_images", "64", "--solve_images", "512"]
    rows = "Z = 0,prefix attend with MSA of clusters and LN(X)"
    done = script("benchmarks/ablation.py", *options, "--output_dir", str(tmp_path), "--rows", rows)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "ablation.json").read_text())
    assert found["Z = 0"] == [{"agreement": 0.125, "seconds": 1.0}]
    (row,) = found["prefix attend with MSA of clusters and LN(X)"]
    assert (row["images"], row["agreement"] > 0.7) == (64, True)
    assert "| Z = 0 | 1 | – | 12.50 |" in (tmp_path / "ablation.md").read_text()


def test_presets_give_way_to_the_file_and_the_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: standard\nbatch_size: 7\n")

    @dataclass(frozen=True)
    class Preset:
        preset: str = "fast"

    def read(*argv: str) -> tuple:
        return parse((Preset, TrainingConfig), list(argv), "", PRESETS)

    assert read()[1].max_steps == PRESETS["fast"]["max_steps"]
    preset, config = read(str(file), "--warmup_steps", "3")
    assert (preset.preset, config.batch_size, config.warmup_steps) == ("standard", 7, 3)
    assert config.max_steps == PRESETS["standard"]["max_steps"]
    with pytest.raises(ValueError, match=r"--preset must be one of .* got 'quick'"):
        read("--preset", "quick")


def test_the_work_of_a_preset_in_steps_of_the_teacher(vit):
    """Six equal blocks, cut from the fourth on: (forward ½ of the teacher, 1 of the student, backward 2 · ½) of 3."""
    cut = skipat_surgery.apply(
        copy.deepcopy(vit), [3], PhiConfig(expansion=2.0, kernel_size=1, prefix="mix", pool=0, reads_x=False)
    )
    assert teacher_steps(cut, vit, 60) == pytest.approx(60 * 2.5 / 3, rel=0.08)


def test_help_reads_well():
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "distill.py"), "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    listed = done.stdout.split()
    for field in (*fields(Arguments), *fields(TrainingConfig)):
        assert f"--{field.name}" in listed, field.name
        assert field.metadata["help"], field.name


@pytest.mark.parametrize(("prefix", "least_cut", "least_solved"), [("attend", 0.94, 0.96), ("mix", 0.45, 0.72)])
def test_the_shared_teacher_cut_and_solved(prefix, least_cut, least_solved):
    """On the real teacher and images: prefix tokens that attend keep most of a classifier, the closed form more."""
    from conftest import shared

    from skipat_surgery.commands import images
    from skipat_surgery.commands.data import load_image_data

    host = loading.load(str(shared("models/cifar10-vit-tiny")))
    data = load_image_data(str(shared("data/cifar10")))
    collate = images.Collate(host.preprocess, host.image_mode, host.image_size)
    train, test = (images.ImageItems(part, "image", "label", "RGB") for part in (data.train, data.evaluation))
    fitting = [collate([train[i] for i in range(start, start + 128)]) for start in range(0, 1024, 128)]
    measuring = collate([test[i] for i in range(256)])["pixel_values"]
    student = skipat_surgery.apply(copy.deepcopy(host.model), range(3, 9), PhiConfig(prefix=prefix))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = host.model(measuring).logits.float().log_softmax(dim=-1)
        cut = student(measuring).logits.float().log_softmax(dim=-1)
        skipat_surgery.solve(student, host.model, fitting)
        solved = student(measuring).logits.float().log_softmax(dim=-1)

    def agreement(found: torch.Tensor) -> float:
        return (found.argmax(dim=-1) == expected.argmax(dim=-1)).float().mean().item()

    def kl(found: torch.Tensor) -> float:
        return F.kl_div(found, expected, log_target=True, reduction="batchmean").item()

    assert agreement(cut) > least_cut
    assert agreement(solved) > least_solved
    assert kl(solved) < 0.7 * kl(cut)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_used_again_without_page_faults():
    script = """
        import resource, torch
        from skipat_surgery.commands.machine import keep_freed_memory

        def page_faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(2**24)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        left = [page_faults() for _ in range(3)][-1]
        assert keep_freed_memory()
        kept = [page_faults() for _ in range(8)][-1]  # the heap may be grown once more before it has a hole that fits
        print(left, kept)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    left, kept = map(int, done.stdout.split())
    assert 20 * kept < left


def test_nothing_is_written_before_everything_is_checked(tmp_path):
    """Neither the demonstration's teacher, nor a repository on the Hub, where something else is wrong."""
    with Hub() as hub:
        environment = hub.environment(tmp_path / "home")
        given = ["--skip", "3-99", "--push_to_hub", "true", "--output_dir", str(tmp_path / "out")]
        code = """
            from skipat_surgery.commands import digits, distill
            train = digits.train_teacher
            digits.train_teacher = lambda: train(steps=1)
            distill.main()
        """
        python = [sys.executable, "-c", textwrap.dedent(code), "--model", "digits", *given]
        done = subprocess.run(
            python, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800, check=False
        )
        assert done.returncode == 2, done.stderr
        assert "allowed are 1 to 11" in done.stderr
        assert hub.repos == {}
    assert not (tmp_path / "out").exists()


def test_a_push_needs_a_login(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="hf auth login"):
        repository("founder/name")
    with pytest.raises(ValueError, match="Repo id"):
        repository("a name with spaces")
