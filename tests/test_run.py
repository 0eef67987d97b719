"""A run of the recipe: its precision, its best model, its seed, and the directory that it holds."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from runs import recipe, small_teacher
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from skipat_surgery.commands import loading, results, run_state
from skipat_surgery.commands.digits import load_digits
from skipat_surgery.commands.measuring import Measuring
from skipat_surgery.commands.output import LOCK
from skipat_surgery.convert.evaluation import score


@pytest.fixture(scope="module")
def teacher(once) -> Path:
    return once("small_teacher", small_teacher)


def stored(model: Path, folder: Path, dtype: torch.dtype) -> Path:
    """The same checkpoint in another dtype."""
    loading.replace(loading.load(str(model)), dtype=dtype).save(loading.load(str(model)).model, folder)
    return folder


@pytest.fixture
def timm_teacher(tmp_path) -> Path:
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 5, "num_heads": 2}
    host = loading.from_timm(timm.create_model("vit_tiny_patch16_224", num_classes=10, **shape))
    host.save(host.model, tmp_path / "timm")
    return tmp_path / "timm"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["teacher", "timm_teacher"])
def test_a_checkpoint_of_half_precision_trains_in_float32_and_is_saved_as_it_was(kind, dtype, request, tmp_path):
    run = recipe(
        stored(request.getfixturevalue(kind), tmp_path / "stored", dtype), tmp_path / "run", max_steps=2, eval_steps=2
    )
    assert {p.dtype for p in run.original.parameters()} == {torch.float32}
    before = {name: weight.detach().clone() for name, weight in run.student.named_parameters()}
    with run.output:
        result = run.distil()
    trained = [(before[name], weight) for name, weight in result.named_parameters() if weight.requires_grad]
    assert all(bool((old != new).any()) for old, new in trained)
    saved = loading.load(str(tmp_path / "run" / "last"))
    assert saved.dtype == dtype
    assert {weight.dtype for weight in load_file(tmp_path / "run" / "last" / "model.safetensors").values()} == {dtype}
    weights = saved.model.state_dict()
    for name, weight in result.named_parameters():
        assert torch.equal(weights[name], weight.detach().to(dtype).float()), name


def test_figures_and_reload_are_those_of_what_was_saved(teacher, tmp_path):
    run = recipe(stored(teacher, tmp_path / "stored", torch.bfloat16), tmp_path / "run")
    run.run()
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (found["dtype"], found["reload_difference"] < 1e-5) == ("bfloat16", True)
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "last")
    assert saved.dtype == torch.bfloat16
    figures, _ = run.measuring.on_all(saved.float())
    for name, value in figures.items():
        assert found["rows"]["distilled"][name] == pytest.approx(value, abs=1e-6), name


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(teacher, tmp_path):
    run = recipe(teacher, tmp_path / "run", learning_rate=1e30, log_steps=1000, max_steps=5, eval_steps=5)
    with run.output, pytest.raises(FloatingPointError, match=r"at step 2: .*lower the learning rates"):
        run.distil()
    assert not (tmp_path / "run" / "last").exists()
    kept = load_file(tmp_path / "run" / "best" / "model.safetensors")
    assert all(bool(weight.isfinite().all()) for weight in kept.values())


def test_no_checkpoint_to_resume_from_holds_weights_that_are_not_finite(teacher, tmp_path):
    run = recipe(teacher, tmp_path / "run", learning_rate=1e30, max_steps=2, eval_steps=2, checkpoint_steps=1)
    run.student.vit.layernorm.weight.register_hook(lambda gradient: gradient * float("nan"))
    with run.output, pytest.raises(FloatingPointError, match="were not written: lower the learning rates"):
        run.distil()
    assert run_state.finished(run.output.checkpoints) == []


def test_weights_that_a_dtype_cannot_hold_are_not_written(teacher, tmp_path):
    host = loading.replace(loading.load(str(teacher)), dtype=torch.float16)
    host.model.classifier.weight.data[0, 0] = 1e5
    with pytest.raises(FloatingPointError, match=r"classifier.weight.*float16 cannot hold them"):
        host.save(host.model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_json_holds_no_number_that_is_not_finite(tmp_path):
    file = tmp_path / "figures.json"
    run_state.write_json(file, {"kl": 1.0})
    with pytest.raises(ValueError, match="JSON"):
        run_state.write_json(file, {"kl": float("inf")})
    assert json.loads(file.read_text()) == {"kl": 1.0}


# Of the start, of each step and of the end: agreement and KL on the sample. The others are ever worse.
COURSES = {
    "the start": ([(0.9, 0.2), (0.8, 0.1), (0.8, 0.1), (0.8, 0.1), (0.85, 0.1)], 0),
    "the middle": ([(0.7, 0.2), (0.8, 0.1), (0.9, 0.2), (0.8, 0.1), (0.85, 0.1)], 2),
    "a tie by its KL": ([(0.7, 0.2), (0.9, 0.3), (0.9, 0.2), (0.9, 0.25), (0.85, 0.1)], 2),
    "a whole tie by its time": ([(0.7, 0.2), (0.9, 0.2), (0.8, 0.2), (0.9, 0.2), (0.85, 0.1)], 3),
    "the end": ([(0.7, 0.2), (0.8, 0.1), (0.9, 0.2), (0.8, 0.1), (0.9, 0.1)], 4),
}


@pytest.mark.parametrize("course", COURSES)
def test_best_is_the_best_on_the_same_images(course, teacher, tmp_path, monkeypatch):
    """Whatever the figures on all images are, which only the stages and the end have."""
    scores, expected = COURSES[course]
    given, models = iter(scores), []
    on_all, on_sample = Measuring.on_all, Measuring.on_sample

    def scripted(model, figures):
        agreement, kl = next(given)
        models.append({name: weight.detach().clone() for name, weight in model.state_dict().items()})
        return {**figures, "agreement": agreement, "kl": kl}

    def all_scripted(self, model):
        figures, sample = on_all(self, model)
        return {**figures, "agreement": 0.99}, scripted(model, sample)

    monkeypatch.setattr(Measuring, "on_all", all_scripted)
    monkeypatch.setattr(Measuring, "on_sample", lambda self, model: scripted(model, on_sample(self, model)))
    run = recipe(teacher, tmp_path / "run", eval_images=50, solve_images=0)
    with run.output:
        run.distil()
    assert run.progress.best["step"] == expected
    weights = loading.load(str(tmp_path / "run" / "best")).model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in models[expected].items())


def test_every_stage_and_every_measured_step_is_compared(teacher, tmp_path):
    """At a rate that makes the model worse at once, a stage of the start remains the best."""
    run = recipe(teacher, tmp_path / "run", learning_rate=0.1, muon_learning_rate=0.05)
    with run.output:
        run.distil()
    stages = {name: score(run.progress.rows[name]) for name in ("cut", "solved")}
    steps = {point["step"]: score(point) for point in run.progress.history if point["step"]}
    assert len(steps) == 4
    assert max(stages.values()) > max(steps.values())
    best = max(stages, key=stages.__getitem__)
    assert run.progress.best["stage"] == best
    assert run.best_figures() == run.progress.rows[best]


def test_the_sample_of_all_images_is_measured_as_it_is_alone(teacher, tmp_path):
    run = recipe(teacher, tmp_path / "run", eval_images=50)
    whole, sample = run.measuring.on_all(run.student)
    alone = run.measuring.on_sample(run.student)
    assert (whole["images"], sample["images"]) == (450, 50)
    assert sample == pytest.approx(alone, abs=1e-6)
    assert sample["kl"] != pytest.approx(whole["kl"], rel=1e-3)


def test_a_best_model_on_the_way_is_measured_on_all_images_from_its_checkpoint(teacher, tmp_path):
    run = recipe(teacher, tmp_path / "run")
    with run.output:
        run.distil()
    run.progress.best["step"] = 2  # as if it were of the second step: the figures are taken from the files
    run.output.save(run.host, run.student, "best")
    found, expected = run.best_figures(), run.progress.rows["distilled"]
    assert found == pytest.approx(expected, abs=1e-6)


def figures(agreement: float) -> dict[str, float]:
    return {"agreement": agreement, "images": 10}


RESULTS = {
    "rows": {"teacher": figures(1.0), "cut": figures(0.5), "solved": figures(0.7), "distilled": figures(0.6)},
    "steps": 9,
    "seconds": 90.0,
    "reload_difference": 0.0,
    "history": [],
    "arguments": {},
}


@pytest.mark.parametrize(
    ("best", "rows", "checked"),
    [
        ({"stage": "solved", "step": 0, "seconds": 5.0}, ["teacher", "cut", "solved"], False),
        ({"stage": "distilled", "step": 3, "seconds": 30.0}, ["teacher", "cut", "solved", "distilled"], False),
        ({"stage": "distilled", "step": 9, "seconds": 90.0}, ["teacher", "cut", "solved", "distilled"], True),
    ],
)
def test_a_checkpoint_holds_its_own_figures(best, rows, checked):
    found = {**RESULTS, "best": {**best, "figures": figures(0.8)}}
    mine, last = (results.of_checkpoint(found, name) for name in ("best", "last"))
    assert (list(mine["rows"]), mine["steps"], mine["seconds"]) == (rows, best["step"], best["seconds"])
    assert mine["rows"][best["stage"]] == figures(0.8)
    assert ("reload_difference" in mine) == checked
    assert (last["rows"], last["steps"]) == (RESULTS["rows"], 9)


@pytest.mark.parametrize("solve_images", [0, 256])
def test_one_seed_gives_one_model_and_another_seed_another(solve_images, teacher, tmp_path):
    """The fresh Φ, and the hidden units that the closed form leaves as they are."""
    found = []
    for number, seed in enumerate((0, 0, 1)):
        torch.randn(number)  # what a program drew before does not count
        run = recipe(teacher, tmp_path / str(number), seed=seed, solve_images=solve_images, expansion=1.0, max_steps=1)
        with run.output:
            found.append(run.distil().state_dict())
    first, again, other = found
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert "vit.layers.2.phi.expand.weight" in changed


def test_classes_in_another_order_are_found_by_their_names(teacher, tmp_path):
    host = loading.load(str(teacher))
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist()
    for weight in host.model.classifier.parameters():
        weight.data = weight.data[order].clone()
    host.model.config.id2label = {number: str(name) for number, name in enumerate(order)}
    host.save(host.model, tmp_path / "permuted")
    found = []
    for number, model in enumerate((teacher, tmp_path / "permuted")):
        run = recipe(model, tmp_path / str(number))
        assert ("in another order, found by their names" in run.data.summary) == bool(number)
        figures, _ = run.measuring.on_all(run.original)
        found.append((figures["top1"], figures["teacher_top1"], figures["labelled"]))
    assert found[0] == found[1]
    assert found[0][0] > 0.2  # twice what chance gives
    with pytest.raises(ValueError, match="the teacher's classes are not the model's, or in another order"):
        recipe(teacher, tmp_path / "other", teacher=str(tmp_path / "permuted"))


@pytest.mark.usefixtures("without_reloading")
def test_images_without_a_label(teacher, tmp_path, monkeypatch):
    """The sample that the best model is found by holds none with a label, and all images hold some."""
    digits = load_digits()
    sample = torch.randperm(450, generator=torch.Generator().manual_seed(0))[:20].tolist()

    def without(row, index):
        return {"label": -1 if index in sample or index % 2 else row["label"]}

    digits["test"] = digits["test"].map(without, with_indices=True)
    monkeypatch.setattr("skipat_surgery.commands.digits.load_digits", lambda: digits)
    run = recipe(teacher, tmp_path / "run", eval_images=20)
    run.run()
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    labels = torch.tensor(digits["test"]["label"][:])
    student, original = loading.load(str(tmp_path / "run" / "last")), loading.load(str(teacher))
    with torch.no_grad():
        pixels = student.preprocess([image.convert("RGB") for image in digits["test"]["image"]])
        mine, theirs = (host.model(pixels).logits.argmax(dim=-1) for host in (student, original))
    row, known = found["rows"]["distilled"], labels >= 0
    assert (row["images"], row["labelled"]) == (450, int(known.sum()))
    assert row["agreement"] == pytest.approx((mine == theirs).float().mean().item(), abs=1e-6)
    assert row["top1"] == pytest.approx((mine == labels)[known].float().mean().item(), abs=1e-6)
    assert "top1" not in found["history"][1]
    assert (
        f"Measured on 450 images, top-1 on {int(known.sum())} of them"
        in (tmp_path / "run" / "last" / "README.md").read_text()
    )


@pytest.fixture
def without_reloading(monkeypatch):
    """A reload is a new process, which takes seconds and is not what is tested here."""
    monkeypatch.setattr("skipat_surgery.commands.distill.difference_after_reload", lambda *args: 0.0)


def test_a_second_run_is_refused_while_the_first_lives(teacher, tmp_path):
    first = recipe(teacher, tmp_path / "run")
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"another run is writing into .*: wait for its end, or choose another"):
            recipe(teacher, tmp_path / "run", resume=resume)
    with first.output:
        pass
    recipe(teacher, tmp_path / "run").output.lock.release()


def test_a_second_run_is_refused_at_its_start_where_the_first_began_after_its_checks(teacher, tmp_path):
    late = recipe(teacher, tmp_path / "other").output
    late.folder = tmp_path / "run"
    first = recipe(teacher, tmp_path / "run")
    late.lock, own = type(first.output)(tmp_path / "run", {}, False, first.accelerator).lock, late.lock
    with pytest.raises(ValueError, match="another run is writing into"):
        late.hold()
    for lock in (own, first.output.lock):
        lock.release()


def test_a_process_that_was_killed_leaves_no_lock(teacher, tmp_path):
    lock = f"from filelock import FileLock; lock = FileLock({str(tmp_path / LOCK)!r}); lock.acquire()"
    code = f"{lock}; print(flush=True); input()"
    victim = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    victim.stdout.readline()
    with pytest.raises(ValueError, match="another run is writing into"):
        recipe(teacher, tmp_path)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    recipe(teacher, tmp_path).output.lock.release()


def test_a_run_that_ended_before_its_first_step_does_not_block_its_directory(teacher, tmp_path):
    first = recipe(teacher, tmp_path / "run")
    with first.output:
        first.start()
    again = recipe(teacher, tmp_path / "run", max_steps=2)  # with other settings too
    with again.output:
        again.distil()
    with pytest.raises(ValueError, match="already holds a run"):
        recipe(teacher, tmp_path / "run")
    with pytest.raises(ValueError, match="max_steps was 2, now 4"):
        recipe(teacher, tmp_path / "run", resume=True)


def test_a_folder_is_there_wherever_its_replacement_was_stopped(tmp_path):
    final = tmp_path / "best"
    (tmp_path / "best.replaced").mkdir()
    (tmp_path / "best.replaced" / "old").touch()
    run_state.recover_folder(final)
    assert [path.name for path in final.iterdir()] == ["old"]
    run_state.replace_folder(final, lambda folder: (folder.mkdir(), (folder / "new").touch()))
    assert [path.name for path in final.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_full_disk_at_a_checkpoint_is_an_error_of_the_disk(teacher, tmp_path, monkeypatch):
    """torch.save tells of one by a RuntimeError, which would pass for a fault of ours."""

    def full(folder: str) -> None:
        raise RuntimeError("unexpected pos 20480 vs 20368")

    run = recipe(teacher, tmp_path / "run")
    monkeypatch.setattr(run.accelerator, "save_state", full)
    with pytest.raises(OSError, match=r"step-00000002.unfinished could not be written: unexpected pos"):
        run_state.save(run.accelerator, run.output.checkpoints, 2)
    assert run_state.finished(run.output.checkpoints) == []
