"""Videos (B, T, C, H, W) go through all that images go through."""

from __future__ import annotations

import copy
import math

import pytest
import reference
import torch
import transformers
from accelerate import Accelerator
from cases import Case, case_named
from models import assert_same, cut_of, phi_weights
from small_models import DEPTH
from torch import Tensor, nn
from transformers import ViTImageProcessor

import skipat_surgery
from skipat_surgery import Evaluator, PhiConfig
from skipat_surgery.commands import benchmark as benchmark_command
from skipat_surgery.commands import report as report_command
from skipat_surgery.commands.sources import load_model
from skipat_surgery.measure.benchmark import LIMIT, UNTOUCHED, benchmark
from skipat_surgery.measure.line_up import line_up
from skipat_surgery.tower import Tower

NAMES = ("VideoMAEForVideoClassification", "VivitForVideoClassification", "VJEPA2ForVideoClassification")
every_video = pytest.mark.parametrize("case", [case_named(name) for name in NAMES], ids=NAMES)


def pair_of(case: Case, phi: PhiConfig | None = None) -> tuple[nn.Module, nn.Module]:
    """A teacher, and a copy of it that is cut."""
    teacher = case.model().float()
    return skipat_surgery.apply(copy.deepcopy(teacher), [2, 3], phi), teacher


def batches_of(case: Case) -> list[Tensor]:
    return [case.images(batch=8, seed=seed).float() for seed in range(4)]


@every_video
def test_a_cut_model_is_solved_refitted_and_distilled(case: Case) -> None:
    student, teacher = pair_of(case)
    batches, measure = batches_of(case), Evaluator(teacher)
    fresh = measure(student, batches)
    assert skipat_surgery.solve(student, teacher, batches, progress=False).images == 32
    solved = measure(student, batches)
    assert solved["patch_cosine"] > fresh["patch_cosine"]
    assert sorted(skipat_surgery.refit(student, teacher, batches, progress=False).after) == [2, 3, 4, 5]
    labels = torch.arange(8) % 5
    labelled = [{**case.given(videos), "labels": labels} for videos in batches]
    weights = skipat_surgery.LossWeights(labels=0.5)
    assert len(skipat_surgery.distill(student, teacher, labelled, steps=2, weights=weights, progress=False).losses) == 2
    assert {"agreement", "kl", "top1"} <= Evaluator(teacher, labelled=True)(student, labelled).keys()


@every_video
def test_the_papers_phi_is_aligned(case: Case) -> None:
    student, teacher = pair_of(case, PhiConfig.paper())
    errors = skipat_surgery.align(student, teacher, batches_of(case), steps=40, progress=False).errors
    assert errors[-1] < errors[0]


@every_video
def test_blocks_are_compared(case: Case) -> None:
    found = skipat_surgery.cka(case.model(), [batch.double() for batch in batches_of(case)], progress=False)
    assert found.images == 32
    torch.testing.assert_close(found.msa.diagonal(), torch.ones(DEPTH, dtype=torch.float64))
    assert (found.cls_attention is not None) == bool(case.prefix)


def test_blocks_are_chosen() -> None:
    case = case_named(NAMES[0])
    plan = skipat_surgery.plan(case.model().float(), batches_of(case), n_skip=1, progress=False)
    assert len(plan.chosen.choice.phi) == 1


def test_the_multiplications_are_those_of_a_kernel_in_three_dimensions() -> None:
    case = case_named("VideoMAEModel")
    phi = PhiConfig(expansion=0.5, kernel_size=(1, 3, 5), pool=0, reads_x=False)
    report = skipat_surgery.report(skipat_surgery.apply(case.model(), [3], phi))
    patches, width, hidden, inside = 2 * 4 * 4, 32, 16, 48
    assert report.blocks[3].macs_after == patches * (2 * width * hidden + 1 * 3 * 5 * hidden + 2 * width * inside)
    assert "2×4×4 patches; MACs for one video" in str(report)
    assert "expansion 0.5, 1×3×5, prefix" in str(report)


@every_video
def test_a_model_is_measured_beside_the_untouched_one(case: Case) -> None:
    rivals = line_up(case.model().float(), [2, 3], {"cut": PhiConfig()})
    found = benchmark(rivals, case.images().float(), rounds=2, progress=False)
    assert [row.name for row in found.rows] == [UNTOUCHED, "cut", LIMIT]
    assert all(row.training_bytes and row.gflops for row in found.rows)


def saved(case: Case, folder: str) -> str:
    model = case.build()
    model.save_pretrained(folder)
    ViTImageProcessor().save_pretrained(folder)
    return folder


@every_video
def test_the_commands_build_videos_of_the_configured_size(case: Case, tmp_path, capsys) -> None:
    folder = saved(case, str(tmp_path / "model"))
    report_command.main([folder])
    shown = capsys.readouterr().out
    assert "4×3×32×32" in shown
    assert "2×4×4 patches" in shown
    assert "skipat convert" not in shown  # which reads images
    args = ["--model", folder, "--skip", "2-3", "--dtypes", "fp32", "--image_sizes", "32", "--rounds", "5"]
    benchmark_command.main([*args, "--expansions", "0.25", "--memory", "false", "--output_dir", str(tmp_path / "out")])
    assert "blocks 2-3, 32 px, fp32, batch 64" in (tmp_path / "out" / "benchmark.md").read_text()
    with pytest.raises(ValueError, match=r"takes videos, and the commands read images.*skipat_surgery.solve"):
        load_model(folder, Accelerator(), tmp_path)


def test_an_integer_is_the_side_along_every_axis_and_a_triple_one_for_each() -> None:
    phis = {2: PhiConfig(kernel_size=5), 3: PhiConfig(kernel_size=(3, 5, 7))}
    blocks = skipat_surgery.apply(case_named("VivitModel").model(), phis).layers
    assert [tuple(blocks[index].phi.depthwise.weight.shape) for index in phis] == [(8, 1, 5, 5, 5), (8, 1, 3, 5, 7)]


def test_patches_that_are_masked_are_an_error() -> None:
    model = skipat_surgery.apply(case_named("VideoMAEModel").model(), [2])
    masked = torch.arange(32).expand(2, -1) % 2 == 0
    with pytest.raises(ValueError, match="Φ was given 16 tokens, but 0 prefix tokens and a 2×4×4 patch grid make 32"):
        model(case_named("VideoMAEModel").images(), bool_masked_pos=masked)


@torch.no_grad()
def test_fewer_frames_than_a_tubelet_has_are_repeated() -> None:
    """By V-JEPA 2, which takes images so."""
    case = case_named("VJEPA2Model")
    stock, images = case.model(), case.images((1, 32, 32))
    cut = cut_of(stock, [2, 3])
    assert Tower.of(cut).grid(images) == (1, 4, 4)
    grid, pools = (1, 4, 4), {2: 2, 3: 2}
    with reference.paper_equations(stock, case.msa, DEPTH, phi_weights(case, cut), grid, 0, pools=pools):
        assert_same(case.tensors(cut, images), case.tensors(stock, images), atol=1e-10, rtol=1e-10)


def test_the_predictor_of_v_jepa_stays_as_it_is() -> None:
    cut = skipat_surgery.apply(case_named("VJEPA2Model").model(), [2, 3])
    assert isinstance(cut, transformers.VJEPA2Model)
    assert not [name for name, _ in cut.predictor.named_modules() if "phi" in name]
    (tower,) = skipat_surgery.report(cut).towers
    assert tower.path == "encoder"
    assert math.prod(tower.grid) == 32
