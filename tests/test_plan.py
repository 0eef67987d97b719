"""`plan`: its dynamic programming against trying every set, its scores against `apply` and `solve`, its budgets."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import random

import pytest
import torch
from cases import case_named
from figures import colours, lines_of, saved_figures

import skipat_surgery
from skipat_surgery import PhiConfig, SkipatConfig
from skipat_surgery.analysis.plan_table import words_of
from skipat_surgery.analysis.planning import OFFERS, POINTS
from skipat_surgery.analysis.scoring import Point
from skipat_surgery.analysis.search import Choice, Score, by_count, combine, unbeaten
from skipat_surgery.commands.options import read_plan

WIDE, NARROW = (PhiConfig(expansion=expansion, prefix="mix") for expansion in (0.5, 0.25))
Z_ALONE = PhiConfig(pool=0, reads_x=False)


@pytest.fixture(scope="module")
def batches():
    torch.manual_seed(0)
    return list(torch.randn(160, 3, 32, 32, dtype=torch.float64).split(20))


@pytest.fixture(scope="module")
def model():
    return case_named("ViTForImageClassification").model()


@pytest.fixture(scope="module")
def planned(model, batches):
    return skipat_surgery.plan(model, batches, n_skip=3, phi=[WIDE, Z_ALONE])


def test_combining_runs_equals_trying_every_set():
    draw, depth = random.Random(0), 6
    runs = [tuple(range(i, j)) for i in range(1, depth) for j in range(i + 1, depth + 1)]
    scores = {(run, Z_ALONE): draw.random() for run in runs}
    scores |= {((block,), phi): draw.random() for block in range(1, depth) for phi in (WIDE, NARROW)}
    saved = {WIDE: 0.02, NARROW: 0.05, Z_ALONE: 0.08}

    def parts(phis: dict[int, PhiConfig]) -> list[tuple[tuple[int, ...], PhiConfig]] | None:
        """The runs of a set, block by block where they have clusters; None where one of Z alone follows another run."""
        found: list[tuple[tuple[int, ...], PhiConfig]] = []
        for block, phi in phis.items():
            last = found[-1] if found and found[-1][0][-1] == block - 1 else None
            if phi.pool or last is None:
                found.append(((block,), phi))
            elif last[1].pool:
                return None
            else:
                found[-1] = ((*last[0], block), phi)
        return found

    found = by_count(combine([Score(*key, value) for key, value in scores.items()], depth, saved))
    for count in range(1, depth):
        for blocks in itertools.combinations(range(1, depth), count):
            for phis in itertools.product(saved, repeat=count):
                pairs = parts(dict(zip(blocks, phis, strict=True)))
                if pairs is None:
                    continue
                divergence = sum(scores[pair] for pair in pairs)
                speedup = 1 / (1 - sum(len(run) * saved[phi] for run, phi in pairs))
                assert any(c.divergence <= divergence + 1e-12 and c.speedup >= speedup - 1e-12 for c in found[count]), (
                    blocks,
                    phis,
                )
    choices = list(itertools.chain(*found.values()))
    for choice in choices:
        assert choice.divergence == pytest.approx(sum(scores[pair] for pair in parts(choice.phi)))
    front = unbeaten(choices, 4)
    assert 1 < len(front) <= 4
    assert front[-1].speedup == max(choice.speedup for choice in choices)
    for choice in front:
        assert not any(c.speedup >= choice.speedup and c.divergence < choice.divergence for c in choices)


def test_a_plan_is_what_apply_takes_and_its_figures_are_what_solve_gives(model, batches, planned):
    plan = planned
    assert len(plan) == 3
    assert plan.images == (120, 40)
    cut = skipat_surgery.apply(copy.deepcopy(model), skip=plan)
    assert cut.config.skipat["phi"].keys() == {str(block) for block in plan}
    held_out = [batches[3], batches[7]]
    skipat_surgery.solve(cut, model, [batch for batch in batches if all(batch is not other for other in held_out)])
    with torch.no_grad():
        log_q, log_p = (m(torch.cat(held_out)).logits.log_softmax(dim=-1) for m in (cut, model))
    assert plan.chosen.divergence == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(dim=1).mean()), rel=1e-4)
    assert plan.chosen.agreement == float((log_q.argmax(1) == log_p.argmax(1)).double().mean())
    speeds = [point.choice.speedup for point in plan.frontier]
    assert speeds == sorted(speeds)
    assert json.loads(json.dumps(plan.to_dict()))["images"] == [120, 40]


def test_a_saved_plan_comes_back_with_every_figure(planned, model, tmp_path):
    planned.save(tmp_path / "plan.json")
    loaded = skipat_surgery.Plan.load(tmp_path / "plan.json")
    assert loaded.to_dict() == planned.to_dict()
    assert dict(loaded) == dict(planned)
    assert (loaded.scores, loaded.images) == (planned.scores, planned.images)
    assert [point.choice.speedup for point in loaded.frontier] == [point.choice.speedup for point in planned.frontier]
    assert str(loaded) == str(planned)
    cut = skipat_surgery.apply(copy.deepcopy(model), skip=loaded)
    assert skipat_surgery.Tower.of(cut).config.phi == dict(planned)
    assert dict(read_plan(tmp_path / "plan.json")) == dict(planned)
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]


def test_a_plan_of_before_has_its_blocks_alone(tmp_path):
    before = SkipatConfig({2: WIDE, 4: Z_ALONE})
    (tmp_path / "plan.json").write_text(json.dumps(before.to_dict()))
    assert read_plan(tmp_path / "plan.json") == before
    with pytest.raises(ValueError, match=r"plan.json holds no plan"):
        skipat_surgery.Plan.load(tmp_path / "plan.json")


def test_figures_that_are_not_finite_come_back_as_such(planned, tmp_path):
    lost = dataclasses.replace(planned, scores=(Score((1,), WIDE, float("nan")),))
    lost.save(tmp_path / "plan.json")
    (score,) = skipat_surgery.Plan.load(tmp_path / "plan.json").scores
    assert math.isnan(score.divergence)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop("plan_version"), "holds no plan"),
        (lambda held: held.update(plan_version=True), "holds no plan"),
        (lambda held: held.update(plan_version=2), "is a plan of version 2, this library reads up to 1: upgrade"),
        (lambda held: held.pop("frontier"), "holds a damaged plan: KeyError, 'frontier'"),
        (lambda held: held["chosen"]["choice"].update(phi={"3": {"pool": 1}}), "damaged plan: ValueError, pool must"),
        (lambda held: held["chosen"]["choice"].update(phi={"3": {"width": 1}}), "damaged plan: TypeError"),
        (lambda held: held.update(images=[1]), "damaged plan: ValueError"),
        (lambda held: held.update(scores=3), "damaged plan: TypeError"),
    ],
)
def test_files_that_hold_no_plan(change, message, planned, tmp_path):
    planned.save(tmp_path / "plan.json")
    held = json.loads((tmp_path / "plan.json").read_text())
    change(held)
    (tmp_path / "plan.json").write_text(json.dumps(held))
    with pytest.raises(ValueError, match=message):
        skipat_surgery.Plan.load(tmp_path / "plan.json")
    with pytest.raises(ValueError, match=f"--plan takes a plan.json of `skipat analyze` or Plan.save: .*{message}"):
        read_plan(tmp_path / "plan.json")


def test_files_that_are_no_plan_at_all(tmp_path):
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ValueError, match=r"plan.json is no JSON"):
        skipat_surgery.Plan.load(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("[3, 4]")
    with pytest.raises(ValueError, match=r"plan.json holds no plan"):
        skipat_surgery.Plan.load(tmp_path / "plan.json")
    with pytest.raises(FileNotFoundError):
        skipat_surgery.Plan.load(tmp_path / "nowhere.json")


def test_a_plan_fits_a_screen_and_says_which_block_has_which_phi():
    phi = {block: OFFERS[block * 3 % 5] for block in range(1, 24)}
    point = Point(Choice(phi, 1.5, 0.25), 0.125, 0.5)
    text = str(skipat_surgery.Plan(point, 1.25, point, 1.375, (point,) * POINTS, (), (1536, 512)))
    assert max(map(len, text.splitlines())) <= 80
    point = Point(Choice({3: OFFERS[0], 4: OFFERS[0], 5: OFFERS[1], 9: OFFERS[0]}, 1.5, 0.25), 0.125, 0.5)
    text = str(skipat_surgery.Plan(point, 1.25, point, 1.375, (point,) * POINTS, (), (1536, 512)))
    assert len(text.splitlines()) <= 24
    (chosen,) = (line for line in text.splitlines() if "chosen" in line)
    assert chosen.split() == ["chosen", "a:3-4,9", "b:5", "0.1250", "50.0", "1.50×", "1.25×"]
    assert "a: clusters of side 2, expansion 0.25" in text
    assert "b: clusters of side 2, patches ask, expansion 0.125" in text
    assert len({words_of(phi) for phi in (*OFFERS, WIDE, NARROW, PhiConfig.paper(), Z_ALONE)}) == len(OFFERS) + 3


def test_the_model_is_left_as_it_was(model, batches):
    before = copy.deepcopy(model.state_dict())
    loose = skipat_surgery.plan(model, batches, max_kl=1e9, phi=Z_ALONE, max_run=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert loose.chosen.choice.speedup == max(point.choice.speedup for point in loose.frontier)


def test_budgets_that_cannot_be_kept(model, batches):
    with pytest.raises(ValueError, match=r"max_kl=-1 cannot be kept: the least that was found is -?0\.\d"):
        skipat_surgery.plan(model, batches, max_kl=-1, phi=Z_ALONE, max_run=1)
    with pytest.raises(ValueError, match=r"speedup=100 is out of reach"):
        skipat_surgery.plan(model, batches, speedup=100, phi=Z_ALONE, max_run=1)


@pytest.mark.parametrize("phi", [Z_ALONE, PhiConfig()], ids=["Z alone", "clusters"])
def test_a_single_run_scores_as_if_it_were_cut_and_solved(model, batches, phi):
    plan = skipat_surgery.plan(model, batches, n_skip=1, phi=phi, max_run=1)
    assert plan.chosen.divergence == pytest.approx(min(score.divergence for score in plan.scores), rel=1e-4)


def test_a_model_without_classes_is_planned_by_its_tokens(batches, tmp_path):
    model = case_named("timm vit, registers").model()
    model.reset_classifier(0)
    plan = skipat_surgery.plan(model, batches, n_skip=2, max_run=2)
    assert {score.phi for score in plan.scores} == set(OFFERS)
    assert plan.chosen.divergence > 0
    assert plan.chosen.agreement is None
    with saved_figures() as figures:
        plan.plot(tmp_path / "frontier.png")
    speeds, values = lines_of(figures[0])["best found"]
    assert speeds == [point.choice.speedup for point in plan.frontier]
    assert values == [point.divergence for point in plan.frontier]
    assert colours(tmp_path / "frontier.png") > 20
    assert plan.table().row_count == len(plan.frontier) + 2


def test_bad_input(model, batches):
    with pytest.raises(ValueError, match="give exactly one of speedup, n_skip and max_kl"):
        skipat_surgery.plan(model, batches, n_skip=2, speedup=1.1)
    with pytest.raises(ValueError, match="speedup must be above 1, and finite, got 1"):
        skipat_surgery.plan(model, batches, speedup=1)
    with pytest.raises(ValueError, match="max_kl must be a number, got nan"):
        skipat_surgery.plan(model, batches, max_kl=math.nan)
    with pytest.raises(ValueError, match="n_skip must be from 1 to 5 for 6 blocks, got 6"):
        skipat_surgery.plan(model, batches, n_skip=6)
    with pytest.raises(ValueError, match="no set of 5 blocks is made of runs this short: give a larger max_run"):
        skipat_surgery.plan(model, batches, n_skip=5, phi=Z_ALONE, max_run=1)
    with pytest.raises(ValueError, match="are too few to solve"):
        skipat_surgery.plan(model, [batches[0][:2], batches[0][2:4]], n_skip=2)
    with pytest.raises(ValueError, match="the model is cut"):
        skipat_surgery.plan(skipat_surgery.apply(copy.deepcopy(model), [2]), batches, n_skip=2)
