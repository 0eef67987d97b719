"""Quality against speed of cuts and what else a user would take: measured, and said in one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import skipat_surgery
from skipat_surgery import PhiConfig
from skipat_surgery.analysis.frontier import BOTH, CUT, INT8, MERGED, NARROW, PRUNED, Contender, Frontier, frontier
from skipat_surgery.commands import benchmark
from skipat_surgery.measure.timing import Estimate

SHAPE = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}
OFFERS = (PhiConfig(), PhiConfig(pool=0, reads_x=False))


def built(classes: int) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SHAPE, num_classes=classes).eval()


@pytest.mark.parametrize("classes", [4, 0])
def test_every_kind_that_can_take_part_does(classes: int, tmp_path: Path) -> None:
    model, batches = built(classes), torch.randn(64, 3, 32, 32).split(16)
    plan = skipat_surgery.plan(model, batches, n_skip=2, phi=OFFERS, progress=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = frontier(model, batches, plan, rounds=5, progress=False)
    assert {one.kind for one in found.contenders} >= {CUT, NARROW, MERGED, BOTH}
    assert {line.partition(":")[0] for line in found.left_out} <= {PRUNED, INT8}
    assert all(0 <= one.kept <= 1 + 1e-6 for one in found.contenders)
    assert [one.kept for one in found.contenders if one.kind == CUT] == pytest.approx(
        [kept_of(model, batches, dict(point.choice.phi)) for point in plan.frontier], abs=1e-6
    )
    names = [one.name for one in found.contenders if one.kind == CUT]
    assert len(set(names)) == len(plan.frontier)  # cuts of the same blocks with another Φ are told apart
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    found.plot(tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
    assert found.measure in found.markdown()
    assert found.verdict() in str(found).replace("\n", " ")


def kept_of(model: nn.Module, batches: tuple[torch.Tensor, ...], phi: dict[int, PhiConfig]) -> float:
    """By hand: cut, solve on the first three batches, compare on the fourth."""
    import copy

    student = skipat_surgery.apply(copy.deepcopy(model), phi)
    skipat_surgery.solve(student, model, batches[:3], progress=False)
    with torch.no_grad():
        if model.num_classes:
            return (student(batches[3]).argmax(-1) == model(batches[3]).argmax(-1)).double().mean().item()
        mine, theirs = student.forward_features(batches[3])[:, 1:], model.forward_features(batches[3])[:, 1:]
    return torch.cosine_similarity(mine, theirs, dim=-1).mean().item()


def at(speed: float) -> Estimate:
    return Estimate(speed, speed, speed)


def test_the_verdict_is_of_the_fastest_that_loses_no_more() -> None:
    contenders = (
        Contender(MERGED, "20%", 0.999, at(1.1)),
        Contender(MERGED, "60%", 0.98, at(1.6)),
        Contender(CUT, "3-5", 0.996, at(1.2)),
        Contender(CUT, "2-8", 0.90, at(1.5)),
        Contender(INT8, "all Linears", 0.999, at(0.9)),
    )
    found = Frontier(contenders, "agreement", 100, ())
    assert found.verdict() == "At 0.5% loss cut (3-5) 1.20× is ahead; then token merging (20%) 1.10×."
    assert found.verdict(0.03) == "At 3.0% loss token merging (60%) 1.60× is ahead; then cut (3-5) 1.20×."
    assert found.verdict(0.0001) == "At 0.0% loss nothing is faster than the untouched model."


def test_the_command_writes_a_picture_a_table_and_a_sentence(tmp_path: Path) -> None:
    model, output = tmp_path / "model", tmp_path / "out"
    timm.models.save_for_hf(built(4), str(model), model_config={"num_classes": 4}, model_args=SHAPE)
    pictures(tmp_path / "images", 64)
    given = ["--frontier", "true", "--model", str(model), "--dataset", str(tmp_path / "images"), "--rounds", "5"]
    benchmark.main([*given, "--num_images", "64", "--batch_size", "16", "--output_dir", str(output)])
    assert {path.name for path in output.iterdir()} == {"frontier.png", "frontier.json", "frontier.md"}
    assert (output / "frontier.md").read_text().startswith("At 0.5% loss ")


def pictures(folder: Path, count: int) -> None:
    folder.mkdir()
    draws = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(draws.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")


def test_quality_needs_images() -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--frontier", "true"])
