"""`skipat`, in this process: its commands and their help, `convert` from pictures to checkpoints, and `report`."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import small_models
import torch
import transformers
from accelerate.state import AcceleratorState
from runs import SHAPE, small_teacher
from safetensors.torch import load_file

import skipat_command
import skipat_surgery
from skipat_surgery import PhiConfig, Plan, SkipatConfig, timm_model
from skipat_surgery.commands import analyze, convert, digits, distill
from skipat_surgery.commands.arguments import Budget
from skipat_surgery.commands.parser import POSITIONAL

QUICK = {
    "num_images": 200,
    "expansions": "0.25",
    "max_run": 1,
    "solve_images": 200,
    "max_steps": 4,
    "batch_size": 25,
    "warmup_steps": 0,
    "eval_steps": 4,
    "checkpoint_steps": 2,
    "rate_scale": 1.0,
    "mixed_precision": "no",
}


pytestmark = pytest.mark.usefixtures("fresh_process")


@pytest.fixture(scope="module")
def teacher(once) -> Path:
    return once("small_teacher", small_teacher)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of the digits as files, without labels."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, row in enumerate(digits.load_digits()["train"].select(range(250))):
        row["image"].save(folder / f"{index}.png")
    return folder


@pytest.fixture
def _no_reload(monkeypatch):
    """Without the new process that each run's checkpoint is loaded in, which takes seconds."""
    monkeypatch.setattr(distill, "difference_after_reload", lambda folder, model, batch: 0.0)


def skipat(*given: object, **options: object) -> None:
    skipat_command.main([*map(str, given), *(f"--{name}={value}" for name, value in options.items())])


@pytest.fixture(scope="module")
def converted(teacher, pictures, tmp_path_factory) -> Path:
    """One conversion for a number of blocks."""
    output = tmp_path_factory.mktemp("converted") / "run"
    skipat("convert", teacher, images=pictures, n_skip=2, output_dir=output, **QUICK)
    AcceleratorState._reset_state(reset_partial_state=True)
    return output


def refused(capsys: pytest.CaptureFixture[str], *given: object, **options: object) -> str:
    """What a command that is refused says."""
    with pytest.raises(SystemExit) as ending:
        skipat(*given, **options)
    said = capsys.readouterr()
    assert ending.value.code == 2
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


def phis_of(config: dict) -> dict[str, dict]:
    return config["skipat"]["phi"]


def test_the_commands_are_listed_each_in_a_line(capsys):
    for argv in ([], ["--help"], ["-h"]):
        skipat_command.main(argv)
        said = capsys.readouterr().out
        for name, line in skipat_command.COMMANDS.items():
            assert [name, *line.split()] in [shown.split() for shown in said.splitlines()]
    skipat("--version")
    assert capsys.readouterr().out.split() == ["skipat", version("skipat-surgery")]
    assert skipat_surgery.__version__ == version("skipat-surgery")


def test_help_does_not_load_the_library():
    check = "import sys, skipat_command; skipat_command.main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True)


def test_a_command_that_is_none(capsys):
    assert "skipat: error: there is no 'modify', only convert, report" in refused(capsys, "modify")


@pytest.mark.parametrize("name", skipat_command.COMMANDS)
def test_every_command_has_a_help_that_begins_with_what_it_is(name, capsys):
    with pytest.raises(SystemExit) as ending:
        skipat(name, "--help")
    assert ending.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: skipat {name} [FILE.yaml]")
    assert f"    skipat {name} " in said
    assert "``" not in said
    assert "default: None" not in said


def test_help_of_convert_names_every_argument_in_its_group(capsys):
    with pytest.raises(SystemExit):
        skipat("convert", "--help")
    said = capsys.readouterr().out
    for field in (*convert.fields(convert.Request), *convert.fields(convert.TrainingConfig)):
        assert (field.name.upper() if POSITIONAL in field.metadata else f"--{field.name} ") in said, field.name
    titles = [line for line in said.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles[:4] == [
        "options:",
        "What to convert, on which images, into what:",
        "The budget to plan for: one of the first three:",
        "How the data set is read:",
    ]


def test_what_is_converted_is_what_was_planned(converted, pictures):
    plan = Plan.load(converted / "plan.json")
    assert len(plan) == 2
    for name in ("best", "last"):
        held = SkipatConfig.from_dict(json.loads((converted / name / "config.json").read_text())["skipat"])
        assert held.phi == dict(plan)
    found = json.loads((converted / "results.json").read_text())
    assert list(found["rows"]) == ["teacher", "cut", "solved", "distilled"]
    assert (found["arguments"]["n_skip"], found["arguments"]["images"]) == (2, str(pictures))
    analysis = json.loads((converted / "analysis.json").read_text())
    assert analysis["plan"] == plan.to_dict()
    assert len(analysis["cka"]["msa"]) == SHAPE["num_hidden_layers"]
    assert {"cka.png", "frontier.png", "curve.png"} <= {path.name for path in converted.iterdir()}


@pytest.mark.parametrize(("asked", "said"), [(1.25, False), (1.5, True), (None, False)])
def test_a_plan_that_was_measured_slower_than_it_was_to_be_is_told(asked, said, converted):
    plan = dataclasses.replace(Plan.load(converted / "plan.json"), speedup=1.25)
    told = analyze.shortfall(plan, Budget(speedup=asked))
    assert ("1.25× was measured, and 1.5× asked for" in told) == said
    assert bool(told) == said


@pytest.mark.usefixtures("_no_reload")
def test_a_resumed_conversion_does_not_plan_again_and_ends_with_the_same_weights(
    converted, teacher, pictures, tmp_path, monkeypatch
):
    given = {"images": pictures, "plan": converted / "plan.json", "output_dir": tmp_path / "run", **QUICK}
    saved = convert.Recipe.save_state

    def killed(recipe, training, step):
        saved(recipe, training, step)
        raise KeyboardInterrupt

    monkeypatch.setattr(convert.Recipe, "save_state", killed)
    with pytest.raises(SystemExit) as ending:
        skipat("convert", teacher, **given)
    assert ending.value.code == 130
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(convert.Recipe, "save_state", saved)
    monkeypatch.setattr(convert, "analysed", None)  # which plans
    skipat("convert", teacher, resume=True, **given)
    whole, resumed = (load_file(path / "last" / "model.safetensors") for path in (converted, tmp_path / "run"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.usefixtures("_no_reload")
def test_a_conversion_that_was_killed_after_its_plan_goes_on_with_that(teacher, pictures, tmp_path, monkeypatch):
    given = {"images": pictures, "n_skip": 1, "output_dir": tmp_path / "run", "cka": False, **QUICK}
    run = convert.Recipe.run
    monkeypatch.setattr(convert.Recipe, "run", lambda recipe: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit):
        skipat("convert", teacher, **given)
    AcceleratorState._reset_state(reset_partial_state=True)
    planned = (tmp_path / "run" / "plan.json").read_bytes()
    monkeypatch.setattr(convert.Recipe, "run", run)
    monkeypatch.setattr(convert, "analysed", None)
    skipat("convert", teacher, resume=True, **{**given, "max_steps": 4})
    assert (tmp_path / "run" / "plan.json").read_bytes() == planned
    held = json.loads((tmp_path / "run" / "last" / "config.json").read_text())
    assert SkipatConfig.from_dict(held["skipat"]).phi == dict(Plan.load(tmp_path / "run" / "plan.json"))


def test_a_resumed_conversion_keeps_its_budget(converted, teacher, pictures, capsys):
    given = {"images": pictures, "output_dir": converted, "resume": True, **QUICK}
    assert "cannot be resumed with other settings: n_skip was 2, now 3" in refused(
        capsys, "convert", teacher, n_skip=3, **given
    )


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "give exactly one of speedup, n_skip and max_kl, got"),
        ({"speedup": 1.3, "n_skip": 2}, "give exactly one of speedup, n_skip and max_kl, got"),
        ({"speedup": 1.3, "plan": "plan.json"}, "--plan is in the place of a budget"),
        ({"plan": "nowhere.json"}, "nowhere.json"),
        ({"n_skip": 5}, "n_skip must be from 1 to 4 for 5 blocks, got 5"),
        ({"speedup": 0.9}, "speedup must be above 1, and finite, got 0.9"),
        ({"max_kl": "nan"}, "max_kl must be a number, got nan"),
        ({"n_skip": 2, "num_images": 20}, "images are too few to solve Φ of width 32"),
        ({"n_skip": 2, "solve_images": 1}, "1 images are too few to solve Φ of width 32"),
        ({"n_skip": 2, "expansions": "wide"}, "--expansions takes numbers above 0"),
        ({"n_skip": 2, "teacher": "/nowhere"}, "/nowhere"),
    ],
)
def test_what_cannot_be_converted_writes_nothing(budget, message, teacher, pictures, tmp_path, capsys):
    options = {**QUICK, "images": pictures, "output_dir": tmp_path / "run", **budget}
    assert message in refused(capsys, "convert", teacher, **options)
    assert list(tmp_path.iterdir()) == []


def test_what_convert_needs_is_named(capsys, tmp_path):
    said = refused(capsys, "convert", n_skip=2)
    assert said.startswith("skipat convert: error: the following arguments are required: MODEL, ")
    file = tmp_path / "run.yaml"
    file.write_text(f"model: /nowhere\nimages: /none\nn_skip: 2\noutput_dir: {tmp_path / 'run'}\n")
    assert "/nowhere" in refused(capsys, "convert", file)


@pytest.mark.usefixtures("_no_reload")
def test_a_plan_of_before_is_taken_as_well(teacher, pictures, tmp_path):
    before = SkipatConfig({2: PhiConfig(), 3: PhiConfig(pool=0, reads_x=False)})
    (tmp_path / "before.json").write_text(json.dumps(before.to_dict()))
    given = {**QUICK, "images": pictures, "plan": tmp_path / "before.json", "output_dir": tmp_path / "run"}
    skipat("convert", teacher, **{**given, "max_steps": 0})
    held = json.loads((tmp_path / "run" / "last" / "config.json").read_text())
    assert SkipatConfig.from_dict(held["skipat"]).phi == before.phi
    assert json.loads((tmp_path / "run" / "plan.json").read_text()) == before.to_dict()


def test_report_of_a_model_that_can_be_cut(tmp_path, capsys):
    small_models.hf("ViTForImageClassification", "ViTConfig")().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # no weights are read
    skipat("report", tmp_path)
    said = capsys.readouterr().out
    for shown in ("ViT and DINO (transformers)", "vit", "3×32×32", "17: 1 prefix tokens, 4×4 patches", "6, counted"):
        assert shown in said
    assert "block 0" in said
    assert "no block before it gives a Z to start from" in said
    assert "blocks 1-5" in said
    assert f"skipat convert {tmp_path} --images" in said


@pytest.mark.parametrize("host", ["transformers", "timm"])
def test_report_of_a_cut_checkpoint(host, tmp_path, capsys):
    if host == "timm":
        cut = skipat_surgery.apply(small_models.timm_model("vit_tiny_patch16_224")(), [2, 4])
        timm_model.save(cut, tmp_path)
    else:
        cut = skipat_surgery.apply(small_models.hf("ViTForImageClassification", "ViTConfig")(), [2, 4])
        cut.save_pretrained(tmp_path)
    skipat("report", tmp_path)
    said = capsys.readouterr().out
    assert "2 of 6 blocks skipped" in said
    assert said.split() == _printed(skipat_surgery.report(cut)).split()


def _printed(found: skipat_surgery.Report) -> str:
    console = analyze.for_wide_tables()
    with console.capture() as captured:
        console.print(found.table())
    return captured.get()


def test_report_of_models_that_cannot_be_cut(tmp_path, capsys):
    transformers.ViTMAEConfig(architectures=["ViTMAEModel"]).save_pretrained(tmp_path / "mae")
    assert "it shuffles and drops patches" in refused(capsys, "report", tmp_path / "mae")
    assert "ResNet holds no vision transformer that can be cut" in refused(capsys, "report", "timm/resnet18")
    small_models.hf("ViTForImageClassification", "ViTConfig")().save_pretrained(tmp_path / "quantised")
    file = tmp_path / "quantised" / "config.json"
    held = json.loads(file.read_text())
    file.write_text(json.dumps({**held, "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}))
    assert "is quantised; cut the plain model first" in refused(capsys, "report", tmp_path / "quantised")


def test_the_command_line_that_is_kept_is_the_one_that_can_be_given_again(monkeypatch):
    from skipat_surgery.commands.command_line import as_given

    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__spec__", None)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/skipat", "convert", "a b"])
    assert as_given("accelerate launch") == "skipat convert 'a b'"
    monkeypatch.setattr(sys, "argv", ["recipes/distill.py", "--skip", "3-8"])
    assert as_given("accelerate launch") == "accelerate launch recipes/distill.py --skip 3-8"
    monkeypatch.setattr(main, "__spec__", type("Spec", (), {"name": "skipat_surgery.commands.distill"})())
    assert as_given("accelerate launch") == "accelerate launch -m skipat_surgery.commands.distill --skip 3-8"
    monkeypatch.setattr(main, "__spec__", type("Spec", (), {"name": "skipat_surgery.__main__"})())
    assert as_given("python") == "python -m skipat_surgery --skip 3-8"
