"""The benchmark: what it measures is what it says, and the limit is the model without the MSA."""

from __future__ import annotations

import copy
import csv
import json
import math
import random

import pytest
import small_models
import timm
import torch
from cases import LEADS
from figures import colours, lines_of, saved_figures
from torch import nn

import skipat_surgery
from benchmarks import alternatives, profiles, sweep
from skipat_surgery import PhiConfig
from skipat_surgery.commands import benchmark as command
from skipat_surgery.commands.options import parse
from skipat_surgery.core.clusters import Clustered
from skipat_surgery.measure import timing
from skipat_surgery.measure.benchmark import LIMIT, UNTOUCHED, Comparison, Rival, Row, benchmark, summary
from skipat_surgery.measure.counting import gflops
from skipat_surgery.measure.limit import limit
from skipat_surgery.measure.line_up import compiled
from skipat_surgery.measure.line_up import line_up as models_of
from skipat_surgery.measure.memory import peak_memory

CPU = torch.device("cpu")
build_vit = small_models.hf("ViTForImageClassification", "ViTConfig")


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_limit_is_the_model_without_the_msa_of_these_blocks():
    torch.manual_seed(0)
    model = build_vit().double().eval()
    found = copy.deepcopy(limit(model, [2, 3]))(images().double()).logits
    x = model.vit.embeddings(images().double())
    for index, block in enumerate(model.vit.layers):
        if index not in (2, 3):
            x = x + block.attention(block.layernorm_before(x))[0]
        x = x + block.mlp(block.layernorm_after(x))
    expected = model.classifier(model.vit.layernorm(x)[:, 0])
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("case", LEADS, ids=lambda case: case.name)
def test_the_limit_of_every_family_runs_and_never_calls_the_msa(case):
    fastest = limit(case.model(), [2, 3])
    assert case.tensors(fastest, case.images())
    for index in (2, 3):
        assert not list(fastest.get_submodule(case.msa.format(index)).parameters())


@torch.no_grad()
@pytest.mark.parametrize("build", [build_vit, lambda: timm.create_model("test_vit", img_size=32)], ids=["hf", "timm"])
def test_the_limit_compiles_without_a_break(build):
    fastest = limit(build().eval(), [1, 2])
    found, expected = torch.compile(fastest, fullgraph=True, backend="aot_eager")(images()), fastest(images())
    if not isinstance(found, torch.Tensor):
        found, expected = found.logits, expected.logits
    torch.testing.assert_close(found, expected)


def test_compiled_models_take_part():
    rivals = models_of(build_vit().eval(), [2, 3], {"cut": PhiConfig()})
    found = benchmark(rivals + compiled(rivals), images(), rounds=5, memory=False, training=False)
    assert [(row.name, row.mode) for row in found.rows[3:]] == [(rival.name, "compiled") for rival in rivals]
    assert all(len(row.seconds) == 5 for row in found.rows)


def test_the_limit_of_a_cut_model_is_refused():
    with pytest.raises(ValueError, match="untouched"):
        limit(skipat_surgery.apply(build_vit(), [2]), [2])
    with pytest.raises(ValueError, match="block 0"):
        limit(build_vit(), [0])


def test_every_call_is_timed_in_every_round():
    made: list[str] = []
    found = timing.latencies({name: lambda name=name: made.append(name) for name in "abc"}, CPU, rounds=7)
    assert {name: len(seconds) for name, seconds in found.items()} == dict.fromkeys("abc", 7)
    rounds = [made[i : i + 3] for i in range(0, len(made), 3)]
    assert len(rounds) == 7 + timing.WARM_UP
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 1  # in an order of its own


def test_the_interval_holds_the_true_median_in_95_of_100_runs():
    drawn = random.Random(0)
    runs = [timing.Estimate.of([drawn.lognormvariate(0, 1) for _ in range(40)]) for _ in range(2000)]
    assert 0.94 < sum(run.low <= 1 <= run.high for run in runs) / len(runs) < 0.985


def rows(full: list[float], cut: list[float], least: list[float]) -> Comparison:
    values = {UNTOUCHED: full, "cut": cut, LIMIT: least}
    return Comparison("", 2, tuple(Row(name, "eager", tuple(seconds)) for name, seconds in values.items()))


def test_the_captured_share():
    found = rows([10.0] * 9, [7.0] * 9, [6.0] * 9)
    share = found.captured(found.row("cut"))
    assert (share.value, share.low, share.high) == (0.75, 0.75, 0.75)
    assert found.speed(found.row("cut")).value == pytest.approx(10 / 7)
    assert found.drowned() == []
    assert summary([found]).splitlines()[-1] == "|  | 1.43×, **75%** | 1.67× |"


def test_a_run_whose_spread_drowns_the_difference_says_so():
    drawn = random.Random(0)
    noisy = [[drawn.gauss(10, 3) for _ in range(9)] for _ in range(3)]
    found = rows(*noisy)
    assert found.captured(found.row("cut")) is None
    assert len(found.drowned()) == 3


def test_peak_memory_is_what_a_call_holds_at_once():
    x = torch.randn(1000, 1000)
    assert peak_memory(lambda: x.exp(), CPU) == 4_000_000
    assert peak_memory(lambda: x.exp().exp(), CPU) == 8_000_000
    assert peak_memory(lambda: x.exp().exp().exp(), CPU) == 8_000_000
    assert peak_memory(lambda: x.sum(), CPU) < 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefix", ["attend", "mix"])
def test_a_cut_model_needs_less_memory_in_a_training_step_and_in_a_forward_what_its_weights_say(prefix, dtype):
    model = timm.create_model("vit_tiny_patch16_224").to(dtype)
    batch = torch.randn(4, 3, 224, 224, dtype=dtype)
    found = benchmark(
        models_of(model, range(3, 9), {"cut": PhiConfig(prefix=prefix, pool=0, reads_x=False)}),
        batch,
        rounds=1,
        progress=False,
    )
    untouched, cut = found.row(UNTOUCHED), found.row("cut")
    assert cut.training_bytes < untouched.training_bytes
    # Of MSA and Φ, without small change: where the prefix tokens attend, the MSA keeps its weights.
    saved = dtype.itemsize * 6 * 192**2 * (-0.5 if prefix == "attend" else 4 - 0.5 - 2)
    assert cut.forward_bytes <= untouched.forward_bytes - saved + 0.05 * abs(saved)


def test_flops_are_counted_per_image_and_the_limit_has_the_fewest():
    model = build_vit().eval()
    found = benchmark(models_of(model, [2, 3], {"cut": PhiConfig()}), images(), rounds=1, progress=False)
    width, tokens, msas = 32, 17, 2
    msa = 2 * (4 * width * width * tokens + 2 * tokens * tokens * width) / 1e9
    difference = found.row(UNTOUCHED).gflops - found.row(LIMIT).gflops
    assert difference == pytest.approx(msas * msa, rel=1e-9)
    assert found.row(LIMIT).gflops < found.row("cut").gflops < found.row(UNTOUCHED).gflops


def test_a_benchmark_without_the_untouched_model_is_refused():
    with pytest.raises(ValueError, match="untouched"):
        benchmark([Rival("cut", build_vit())], images())


@torch.no_grad()
@pytest.mark.parametrize("case", LEADS, ids=lambda case: case.name)
def test_unfused_attention_is_the_same_model(case):
    if case.name == "Phi4MultimodalVisionModel":
        pytest.skip("the stock model is causal in SDPA only")
    model, images = case.model().float(), case.images().float()
    for mine, theirs in zip(case.tensors(alternatives.unfuse(model), images), case.tensors(model, images), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("build", [build_vit, small_models.hf("Dinov2ForImageClassification", "Dinov2Config")])
def test_pruning_saves_what_the_cut_saves_and_goes_with_it(build):
    pytest.importorskip("torch_pruning")
    model = build().eval()
    whole = gflops(model)
    pruned = alternatives.prune(model, images(1), 0.2 * whole)
    assert gflops(pruned) == pytest.approx(0.8 * whole, rel=0.08)  # widths are multiples of 8
    both = skipat_surgery.apply(copy.deepcopy(pruned), [2, 3])
    assert gflops(both) < gflops(pruned)
    with torch.no_grad():
        assert both(images()).logits.isfinite().all()


@torch.no_grad()
def test_int8_is_close_to_the_model():
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    model = build_vit().eval()
    found = alternatives.int8(Rival(UNTOUCHED, model)).model(images()).logits
    expected = model(images()).logits
    assert (found - expected).norm() / expected.norm() < 0.05
    assert not torch.equal(found, expected)


def test_a_sweep_leaves_out_what_would_not_fit(monkeypatch, tmp_path):
    def build(side):
        return small_models.hf("ViTForImageClassification", "ViTConfig", image_size=8 * side)().eval()

    def line_up(model, images):
        return models_of(model, [2, 3], {"cut": PhiConfig()})

    monkeypatch.setattr(sweep, "TOKENS_A_BATCH", 64)
    sizes = sweep.sweep(build, line_up, [2, 4, 8], max_seconds=0.1)
    assert [size.tokens for size in sizes] == [4, 16, 64]
    sweep.write_csv(sizes, tmp_path / "sweep.csv")
    written = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [(row["tokens"], row["batch"], row["model"]) for row in written[:4]] == [
        ("4", "16", "untouched"),
        ("4", "16", "cut"),
        ("4", "16", "limit"),
        ("16", "4", "untouched"),
    ]
    with saved_figures() as figures:
        sweep.plot(sizes, "title", tmp_path / "sweep.png")
    shown = [points for name, points in lines_of(figures[0]).items() if name.startswith("untouched")]
    assert shown == [sweep.lines(sizes)["untouched"]]
    assert colours(tmp_path / "sweep.png") > 20

    peak = sweep.foretold(sizes[:1], 16) / 4
    monkeypatch.setattr(sweep, "free_memory", lambda device: peak)
    small = sweep.sweep(build, line_up, [2, 8], max_seconds=0.1)
    assert small[0].comparison is not None
    assert small[1].comparison is None
    assert "needs up to" in sweep.markdown(small)


def test_the_slope_is_the_exponent():
    tokens = [100, 200, 400, 800]
    assert sweep.slope(tokens, [3e-5 * n**1.5 for n in tokens]) == pytest.approx(1.5)
    assert math.isnan(sweep.slope([100], [1.0]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the configuration of a small model lies, without weights."""
    path = tmp_path_factory.mktemp("config")
    model = build_vit()
    model.config.architectures = ["ViTForImageClassification"]
    model.config.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("script", "extra"),
    [(command, []), (sweep, ["--sides", "2,4"]), (profiles, [])],
    ids=["benchmark", "sweep", "profiles"],
)
def test_the_command(folder, tmp_path, script, extra):
    threads = torch.get_num_threads()
    args = ["--model", str(folder), "--skip", "2-3", "--image_sizes", "32,64", "--dtypes", "fp32", "--rounds", "5"]
    script.main([*args, "--expansions", "0.25,paper", "--max_seconds", "1", "--output_dir", str(tmp_path), *extra])
    found, text = json.loads((tmp_path / "benchmark.json").read_text()), (tmp_path / "benchmark.md").read_text()
    assert f"{threads} threads" in found["machine"]
    if script is profiles:
        assert "norm and MSA" in text
        assert "aten::mkldnn_convolution" in text
        return
    assert len(found["tables"]) == 2
    names = [row["name"] for row in found["tables"][0]["rows"]]
    assert names == ["untouched", "cut, expansion 0.25", "cut, the paper's Φ", "limit"]
    assert all(len(row["seconds"]) >= 5 for table in found["tables"] for row in table["rows"])
    assert (tmp_path / "sweep.csv").exists() == (script is sweep)


def test_the_command_refuses_what_it_does_not_know(folder, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["--model", str(folder), "--dtypes", "int4", "--output_dir", str(tmp_path)])
    assert "--dtypes takes" in capsys.readouterr().err


def test_phi_gives_the_same_numbers_with_and_without_gradients():
    for config in (PhiConfig(pool=3), PhiConfig(prefix="mix", pool=0), PhiConfig.paper()):
        torch.manual_seed(0)
        phi = skipat_surgery.Phi(32, 1, config)
        nn.init.normal_(phi.reduce.bias)
        z = torch.randn(2, 17, 32)
        given = {"rows": torch.randn(2, 1, 32)} if phi.attends else {}
        given |= {"x": torch.randn(2, 17, 32)} if phi.reads_x else {}
        if phi.pool:
            clusters = phi.clusters(given["x"], (4, 4))
            given["clustered"] = Clustered(clusters, torch.randn(2, 4, 32), torch.randn(2, 4, 32))
        before = z.clone()
        with torch.no_grad():
            found = phi(z, (4, 4), **given)
        assert torch.equal(found, phi(z, (4, 4), **given).detach())
        assert torch.equal(z, before)


def test_the_command_compares_what_becomes_of_prefix_tokens():
    (args,) = parse((command.Arguments,), ["--expansions", "0.25", "--prefix", "attend,mix", "--pool", "0"], "")
    assert args.phis == {
        "cut, expansion 0.25, prefix attend": PhiConfig(pool=0),
        "cut, expansion 0.25, prefix mix": PhiConfig(prefix="mix", pool=0),
    }
