"""Grids that differ by image: each image comes out of a batch as it does alone, and is learned from as it is alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import case_named
from cases.ragged import naflex, packed_order, siglip2, sizes_of
from models import KINDS_OF_PHI, cut_of
from small_models import rms_norm
from torch import Tensor, nn
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

import skipat_surgery
from skipat_surgery import Phi, PhiConfig
from skipat_surgery.analysis.cka import MinibatchCKA, gram
from skipat_surgery.convert.losses import distances, relative_error
from skipat_surgery.convert.moments import sampled
from skipat_surgery.core.clusters import Clusters
from skipat_surgery.core.depthwise import DepthwiseConv2d
from skipat_surgery.core.packed import Packed
from skipat_surgery.core.packed_carrying import window_arguments
from skipat_surgery.core.packed_windows import in_windows
from skipat_surgery.core.ragged import Ragged
from skipat_surgery.measure.benchmark import UNTOUCHED, Rival, benchmark
from skipat_surgery.observing import outputs_of, pixels_of, z_of
from skipat_surgery.tower import Tower

QWEN2_5 = "Qwen2_5_VisionTransformerPretrainedModel"
EXACT = {"atol": 1e-10, "rtol": 1e-10}
PHIS = {
    **KINDS_OF_PHI,
    "seeds far apart": PhiConfig(prefix="pass", pool=3, kernel_size=7),
    "reads Z alone": PhiConfig(pool=0, reads_x=False),
}
every_phi = pytest.mark.parametrize("phi", PHIS.values(), ids=PHIS.keys())
GRIDS = [(4, 3), (2, 5), (1, 7), (6, 1), (1, 1)]  # and so places for as many patches as the largest has


def batch(channels: int = 192) -> dict[str, Tensor]:
    """Patches of images of every shape in `GRIDS`, as SigLIP 2 takes them."""
    sizes = torch.tensor(GRIDS)
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(len(GRIDS), 12, channels, generator=generator, dtype=torch.float64)
    mask = (torch.arange(12) < sizes.prod(dim=1, keepdim=True)).int()
    return {"pixel_values": patches, "spatial_shapes": sizes, "pixel_attention_mask": mask}


def alone(inputs: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """One image of a batch, without padding."""
    count = int(inputs["spatial_shapes"][number].prod())
    cut = slice(number, number + 1)
    return {name: part[cut] if name == "spatial_shapes" else part[cut, :count] for name, part in inputs.items()}


@torch.no_grad()
@every_phi
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_image_comes_out_of_a_batch_as_it_does_alone(phi, implementation, exact_softmax, exact_steps):
    cut = cut_of(case_named("Siglip2VisionModel").model(), [2, 3, 5], phi)
    cut.set_attn_implementation(implementation)
    inputs = batch()
    found = cut(**inputs)
    for number in range(len(GRIDS)):
        expected = cut(**alone(inputs, number))
        tokens = found.last_hidden_state[number, : expected.last_hidden_state.shape[1]]
        torch.testing.assert_close(tokens, expected.last_hidden_state[0], **EXACT)
        torch.testing.assert_close(found.pooler_output[number], expected.pooler_output[0], **EXACT)


@torch.no_grad()
@every_phi
def test_the_padding_may_hold_anything(phi):
    cut = cut_of(case_named("Siglip2VisionModel").model(), [2, 3, 5], phi)
    inputs = batch()
    real = inputs["pixel_attention_mask"].bool()
    other = {**inputs, "pixel_values": inputs["pixel_values"].masked_fill(~real[..., None], 100.0)}
    tokens, others = (cut(**given).last_hidden_state for given in (inputs, other))
    torch.testing.assert_close(tokens[real], others[real], **EXACT)
    assert not torch.allclose(tokens[~real], others[~real])


@torch.no_grad()
@every_phi
def test_grids_that_are_alike_give_what_one_grid_gives(phi):
    """Φ by itself, on whole images, with a prefix and a suffix."""
    module = Phi(dim=16, num_prefix_tokens=2, config=phi, num_suffix_tokens=1).double()
    for parameter in module.parameters():
        parameter.copy_(torch.randn_like(parameter))
    z, x = torch.randn(2, 3, 2 + 15 + 1, 16, dtype=torch.float64)
    rows, means = torch.randn(3, 3, 16, dtype=torch.float64), None

    def made(grid: Any) -> Tensor:
        given: dict[str, Any] = {"rows": rows if module.attends else None, "x": x}
        if module.pool:
            clusters = module.clusters(x, grid)
            means = clusters.means(x)[:, 3:]
            given["clustered"] = skipat_surgery.core.clusters.Clustered(clusters, means, means.flip(-1))
        return module(z, grid, **given)

    assert means is None
    torch.testing.assert_close(made(Ragged(torch.tensor([[3, 5]] * 3), 15)), made((3, 5)), **EXACT)


def test_seeds_of_each_image_are_those_of_its_grid():
    h = torch.randn(len(GRIDS), 12, 8)
    grids = Ragged(torch.tensor(GRIDS), 12)
    clusters = Clusters.of(h, 0, 0, grids, 2, grids.real)
    for number, grid in enumerate(GRIDS):
        count = grid[0] * grid[1]
        own = Clusters.of(h[number : number + 1, :count], 0, 0, grid, 2)
        assert torch.equal(clusters.seeds[number, : len(own.seeds)], own.seeds)
        assert torch.equal(clusters.places[number, :count], own.places[0])
        counts = clusters.counts()[number]
        assert torch.equal(counts[: len(own.seeds)], own.counts()[0])
        assert not counts[len(own.seeds) :].any()


@pytest.mark.parametrize("kernel", [3, (5, 3)])
def test_neighbours_are_gathered_in_a_graph_as_they_lie_on_a_grid(kernel, monkeypatch):
    conv = DepthwiseConv2d(6, kernel).double()
    grids = Ragged(torch.tensor(GRIDS), 12)
    found = {}
    for recorded in (False, True):
        monkeypatch.setattr("skipat_surgery.core.ragged.is_recorded", lambda recorded=recorded: recorded)
        hidden = torch.randn(5, 12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = conv(hidden, grids).mT[grids.real]
        conv.zero_grad()
        out.square().sum().backward()
        found[recorded] = [out, hidden.grad, conv.weight.grad.clone(), conv.bias.grad.clone()]
    for dense, gathered in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(dense, gathered, **EXACT)


@pytest.mark.parametrize("side", [2, 3, 5])
def test_no_grid_has_more_seeds_than_a_graph_has_room_for(side):
    for length in range(1, 60):
        every = torch.tensor([(rows, length // rows) for rows in range(1, length + 1)])
        assert Ragged(every, length)._most_seeds(side) <= -(-length // side)


@torch.no_grad()
@every_phi
@pytest.mark.parametrize("name", ["timm naflex, patches", "timm naflex, patches, rope"])
def test_an_image_comes_out_of_timms_patches_as_it_does_alone(name, phi, exact_steps):
    case = case_named(name)
    cut, images = cut_of(case.model(), [2, 3, 5], phi), case.images(batch=4)
    inputs = naflex(images)
    found = cut(inputs)
    for number, count in enumerate(sizes_of(images).prod(dim=1).tolist()):
        own = {name: part[number : number + 1, :count] for name, part in inputs.items()}
        torch.testing.assert_close(found[number], cut(own)[0], **EXACT)


def frames(sizes: list[tuple[int, int, int]], channels: int = 3 * 2 * 8 * 8) -> dict[str, Tensor]:
    """Packed patches of images or videos of so many frames, rows and columns, as Qwen's towers take them."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.tensor(sizes)
    patches = torch.randn(int(grid.prod(dim=1).sum()), channels, generator=generator, dtype=torch.float64)
    return {"hidden_states": patches, "grid_thw": grid}


@torch.no_grad()
@every_phi
@pytest.mark.parametrize("name", ["Qwen2VLModel", "Qwen3VLVisionModel", QWEN2_5])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_image_comes_out_of_a_sequence_as_it_does_alone(name, phi, implementation, exact_softmax, exact_steps):
    whole = cut_of(case_named(name).model(), [2, 3, 5], phi)
    cut = getattr(whole, "visual", whole)
    cut.set_attn_implementation(implementation)
    sizes = [(1, 4, 6), (3, 2, 8), (1, 2, 2)]  # one of them a video
    inputs = frames(sizes, 3 * 2 * cut.config.patch_size**2)
    found, first = cut(**inputs).last_hidden_state, 0
    for count, rows, columns in sizes:
        for _ in range(count):
            own = inputs["hidden_states"][first : first + rows * columns]
            alone = cut(own, grid_thw=torch.tensor([[1, rows, columns]])).last_hidden_state
            torch.testing.assert_close(found[first : first + rows * columns], alone, **EXACT)
            first += rows * columns
    assert first == len(found)


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_packing_undoes_laying_out(merge):
    sizes = merge * torch.tensor([[2, 3], [1, 1], [4, 1]])
    grids = Packed.of(sizes, merge)
    sequence = torch.randn(int(sizes.prod(dim=1).sum()), 5)
    laid = grids.lay_out(sequence)
    assert laid.shape == (3, 6 * merge**2, 5)
    assert torch.equal(grids.pack(laid, sequence), sequence)
    assert torch.equal(grids.pack(laid, sequence[None]), sequence[None])
    places = [row * 3 * merge + column for row, column in packed_order(2 * merge, 3 * merge, merge)]
    assert torch.equal(laid[0, places], sequence[: 6 * merge**2])


@pytest.mark.parametrize("merge", [1, 2])
def test_patches_are_packed_where_the_host_places_them(merge):
    sizes = torch.tensor([[1, 4, 6], [2, 2, 8]])
    places = get_vision_position_ids(sizes, merge)
    grids = Packed.of(sizes[:, 1:].repeat_interleave(sizes[:, 0], dim=0), merge)
    expected = torch.stack(grids.at(), dim=-1)
    assert torch.equal(places[grids.places][grids.real], expected[grids.real])


def test_windows_lie_where_the_host_lays_them():
    """Whose edges are smaller, but for those of images that are a whole number of windows, or one alone."""
    sizes = torch.tensor([[1, 4, 6], [2, 14, 8], [1, 2, 2], [1, 12, 12]])
    order, bounds = get_vision_window_index(sizes, spatial_merge_size=2, window_size=12, patch_size=2)
    frames_of_all = sizes[:, 1:].repeat_interleave(sizes[:, 0], dim=0)
    grids = in_windows(frames_of_all, merge=2, side=6)
    found = window_arguments(grids, merge=2)
    assert torch.equal(found["window_index"], order)
    assert torch.equal(found["cu_window_seqlens"], bounds)
    places = get_vision_position_ids(sizes, 2).unflatten(0, (-1, 4))[order].flatten(0, 1)
    expected = torch.stack(grids.at(), dim=-1)
    assert torch.equal(places[grids.places][grids.real], expected[grids.real])


def test_a_report_says_which_blocks_attend_to_the_whole_image():
    cut = skipat_surgery.apply(case_named(QWEN2_5).model(), [2, 3])
    report = skipat_surgery.report(cut)
    assert report.towers[0].global_blocks == (3,)
    assert "blocks 3 attend to the whole image, the others within windows of it" in " ".join(str(report).split())
    cut = skipat_surgery.apply(case_named("Qwen3VLVisionModel").model(), [2, 3])
    assert skipat_surgery.report(cut).towers[0].global_blocks is None


@torch.no_grad()
@every_phi
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_image_of_pixtral_comes_out_as_it_does_alone(phi, implementation, exact_softmax, monkeypatch):
    monkeypatch.setattr("transformers.models.pixtral.modeling_pixtral.PixtralRMSNorm.forward", rms_norm)
    case = case_named("PixtralVisionModel")
    cut, images = cut_of(case.model(), [2, 3, 5], phi), case.images(batch=3)
    cut.set_attn_implementation(implementation)
    sizes, first = [(32, 24), (16, 32), (8, 8)], 0
    found = cut(images, image_sizes=torch.tensor(sizes)).last_hidden_state[0]
    for image, (height, width) in zip(images, sizes, strict=True):
        alone = cut(image[None, :, :height, :width]).last_hidden_state[0]
        torch.testing.assert_close(found[first : first + len(alone)], alone, **EXACT)
        first += len(alone)
    assert first == len(found)


def pair(name: str = "Siglip2ForImageClassification") -> tuple[nn.Module, nn.Module]:
    """A cut model and its teacher, in float32."""
    teacher = case_named(name).model().float()
    return skipat_surgery.apply(copy.deepcopy(teacher), [2, 3, 5]), teacher


def batches(count: int = 8) -> list[dict[str, Tensor]]:
    case = case_named("Siglip2ForImageClassification")
    return [siglip2(case.images(batch=8, seed=seed).float()) for seed in range(count)]


def with_other_padding(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    unseen = inputs["pixel_attention_mask"] == 0
    return {**inputs, "pixel_values": inputs["pixel_values"].masked_fill(unseen[..., None], 10.0)}


@pytest.mark.parametrize("step", ["solve", "refit", "align", "distill"])
def test_no_step_learns_from_padding(step):
    """What it leaves is the same, whatever the padding holds."""
    found = []
    for change in (dict, with_other_padding):
        student, teacher = pair()
        torch.manual_seed(0)
        options = {"solve": {}, "refit": {}, "align": {"steps": 2}, "distill": {"steps": 2, "rate_scale": 0.1}}[step]
        run = getattr(skipat_surgery, step)
        before = {name: parameter.clone() for name, parameter in student.named_parameters()}
        run(student, teacher, list(map(change, batches())), progress=False, **options)
        after = dict(student.named_parameters())
        assert any(not torch.equal(before[name], after[name]) for name in after)
        found.append(after)
    for name, parameter in found[0].items():
        torch.testing.assert_close(parameter, found[1][name], atol=1e-4, rtol=1e-4)


def test_a_solved_model_is_measured_image_by_image():
    student, teacher = pair()
    solved = skipat_surgery.solve(student, teacher, batches(), progress=False)
    assert all(0 < error < 1 for error in solved.patches.values())
    evaluator = skipat_surgery.Evaluator(teacher)
    every = evaluator.by_image(student, batches(1))
    again = evaluator.by_image(student, list(map(with_other_padding, batches(1))))
    assert len(every["patch_cosine"]) == 8
    for name, column in every.items():
        torch.testing.assert_close(column, again[name], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_terms_of_the_loss_are_those_of_each_image_alone():
    student, teacher = pair()
    inputs = batches(1)[0]
    towers = Tower.of(student), Tower.of(teacher)

    def terms(given: dict[str, Tensor]) -> dict[str, Tensor]:
        found, expected = (
            outputs_of(model, tower, pixels_of(given)) for model, tower in zip((student, teacher), towers, strict=True)
        )
        return distances(found, expected, 0)

    together = terms(inputs)
    for number in range(8):
        for name, value in terms(alone(inputs, number)).items():
            torch.testing.assert_close(together[name][number], value[0], atol=1e-5, rtol=1e-4)


def test_errors_and_samples_leave_padding_out():
    real = torch.tensor([[True, True, False], [True, False, False]])
    found, expected = torch.randn(2, 2, 3, 4)
    every = expected[real]
    variance = (every - every.mean(dim=0)).square().mean()
    by_hand = torch.stack(
        [(found[0, :2] - expected[0, :2]).square().mean(), (found[1, 0] - expected[1, 0]).square().mean()]
    )
    torch.testing.assert_close(relative_error(found, expected, 0, real), by_hand / variance)
    (rows,) = sampled(0, found, real=real)
    assert sorted(rows[:, 0].tolist()) == sorted(found[real][:, 0].tolist())


def test_timms_pairs_of_patches_and_labels_are_taken():
    case = case_named("timm naflex, patches")
    teacher = case.model().float()
    student = skipat_surgery.apply(copy.deepcopy(teacher), [2, 3])
    given = [(naflex(case.images(batch=8, seed=seed).float()), torch.zeros(8)) for seed in range(8)]
    solved = skipat_surgery.solve(student, teacher, given, progress=False)
    assert all(0 < error < 1 for error in solved.patches.values())
    trained = skipat_surgery.distill(student, teacher, given, steps=2, rate_scale=0.1, progress=False)
    assert len(trained.losses) == 2
    assert skipat_surgery.Evaluator(teacher)(student, given)["images"] == 64


@pytest.mark.parametrize(
    "name", ["Qwen2VLModel", "Qwen3VLVisionModel", "Qwen3VLForConditionalGeneration", "Mistral3Model", QWEN2_5]
)
def test_a_packed_model_is_converted(name):
    """Batches as the processor gives them; the tower alone runs."""
    case = case_named(name)
    teacher = case.model().float()
    student = skipat_surgery.apply(copy.deepcopy(teacher), [2, 3, 5])
    given = []
    for seed in range(8):
        inputs = case.given(case.images(batch=4, seed=seed).float())
        pixels, grid = inputs.values()
        given.append({"pixel_values": pixels, "image_sizes" if "image_sizes" in inputs else "image_grid_thw": grid})
    evaluator = skipat_surgery.Evaluator(teacher)
    fresh = evaluator(student, given)["patch_cosine"]
    solved = skipat_surgery.solve(student, teacher, given, progress=False)
    assert solved.images == 32
    assert all(0 < error < 1 for error in solved.patches.values())
    better = evaluator(student, given)["patch_cosine"]
    assert better > fresh
    refitted = skipat_surgery.refit(student, teacher, given, progress=False)
    assert refitted.images == (24, 8)
    assert all(refitted.after[index] <= refitted.before[index] for index in refitted.after)
    aligned = skipat_surgery.align(student, teacher, given, steps=2, progress=False)
    assert aligned is not None
    trained = skipat_surgery.distill(student, teacher, given, steps=16, rate_scale=0.1, progress=False)
    assert sum(trained.losses[8:]) < sum(trained.losses[:8])  # on the same batches again


def test_a_packed_tower_takes_images_of_one_size_as_well():
    teacher = case_named("Qwen3VLVisionModel").model().float()
    student = skipat_surgery.apply(copy.deepcopy(teacher), [2, 3])
    images = list(torch.randn(66, 3, 32, 48).split(16))  # the last batch is smaller
    assert skipat_surgery.solve(student, teacher, images, progress=False).images == 66
    tower = Tower.of(teacher)
    assert tower.grid(images[0]) == (4, 6)
    patches, others = tower.arguments(images[0][:1])
    expected = [
        torch.stack([images[0][0, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]] * 2, dim=1).flatten()
        for row, column in packed_order(4, 6)
    ]
    assert torch.equal(patches, torch.stack(expected))
    assert others["grid_thw"].tolist() == [[1, 4, 6]]


def test_plan_takes_patches():
    plan = skipat_surgery.plan(pair()[1], batches(), n_skip=2, phi=PhiConfig(), progress=False)
    assert plan.images == (48, 16)
    assert len(plan) == 2


def test_a_tower_takes_images_of_one_size_as_well():
    student, teacher = pair("Siglip2VisionModel")
    images = torch.randn(64, 3, 24, 40).split(16)
    solved = skipat_surgery.solve(student, teacher, images, progress=False)
    assert solved.images == 64
    assert Tower.of(student).grid(images[0]) == (3, 5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["Siglip2VisionModel", "Qwen3VLVisionModel", "PixtralVisionModel", QWEN2_5])
def test_hidden_states_are_saved_as_tensors_are(name, tmp_path):
    """Which carry the grids: a program without this library loads them too."""
    case = case_named(name)
    found = case.call(cut_of(case.model()), case.images(), output_hidden_states=True)
    for tensor in (found.last_hidden_state, *found.hidden_states):
        torch.save(tensor, tmp_path / "tensor.pt")
        assert torch.equal(torch.load(tmp_path / "tensor.pt", weights_only=True), tensor)


@pytest.mark.parametrize("name", ["Siglip2VisionModel", "Qwen3VLVisionModel"])
def test_a_tower_takes_part_in_a_benchmark_on_images_of_one_size(name):
    teacher = case_named(name).model().float()
    rivals = [Rival(UNTOUCHED, teacher), Rival("cut", skipat_surgery.apply(copy.deepcopy(teacher), [2, 3]))]
    found = benchmark(rivals, torch.randn(2, 3, 32, 32), rounds=3, progress=False)
    assert all(row.gflops and row.training_bytes for row in found.rows)


def test_wrong_inputs_are_refused_early():
    cut = cut_of(case_named("Siglip2VisionModel").model())
    inputs = batch()
    with pytest.raises(ValueError, match=r"needs patches \(B, N, patch\) with spatial_shapes \(B, 2\).*processor"):
        cut(**{**inputs, "spatial_shapes": inputs["spatial_shapes"][:2]})
    with pytest.raises(ValueError, match=r"DINO.* takes images of one size.*spatial_shapes"):
        outputs_of(vit := case_named("ViTModel").model(), Tower.of(vit), pixels_of(inputs))
    cut = cut_of(case_named("timm naflex, patches").model())
    patches = naflex(case_named("timm naflex, patches").images())
    with pytest.raises(ValueError, match=r"whole grid of each image.*as timm's collator does"):
        cut({**patches, "patch_coord": patches["patch_coord"].flip(1)})
    cut = cut_of(case_named("Qwen3VLVisionModel").model())
    inputs = frames([(1, 4, 6), (1, 2, 2)])
    with pytest.raises(ValueError, match=r"makes 28 patches, but 27 were given.*one call of the processor"):
        cut(inputs["hidden_states"][:27], grid_thw=inputs["grid_thw"])
    with pytest.raises(ValueError, match="a side is no multiple of 2"):
        cut(inputs["hidden_states"][:21], grid_thw=torch.tensor([[1, 3, 7]]))
    with pytest.raises(ValueError, match=r"needs grid_thw \(images, 3\).*got None.*image_grid_thw"):
        cut(inputs["hidden_states"])
    cut = cut_of(case_named("PixtralVisionModel").model())
    images = case_named("PixtralVisionModel").images()
    for wrong in (torch.tensor([[32, 32]]), torch.tensor([[32, 32], [32, 40]])):
        with pytest.raises(ValueError, match=r"needs image_sizes \(images, 2\).*up to \[\[32, 32\]\]"):
            cut(images, image_sizes=wrong)


def given(name: str, images: list[tuple[tuple[int, int], Tensor]]) -> dict[str, Tensor]:
    """What a tower takes of images, each its grid and its patches (N, channels)."""
    sizes, patches = torch.tensor([size for size, _ in images]), [part for _, part in images]
    if "Qwen" in name:
        grid = torch.cat([torch.ones(len(sizes), 1, dtype=torch.long), sizes], dim=1)
        return {"hidden_states": torch.cat(patches), "grid_thw": grid}
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(part)) for part in patches], batch_first=True)
    padded = torch.nn.utils.rnn.pad_sequence(patches, batch_first=True, padding_value=7.0)
    return {"pixel_values": padded, "spatial_shapes": sizes, "pixel_attention_mask": mask.int()}


@pytest.mark.parametrize(
    ("name", "channels"), [("Siglip2VisionModel", 192), ("Qwen3VLVisionModel", 384), (QWEN2_5, 24)]
)
def test_cka_compares_the_images_of_a_batch_that_have_one_grid(name, channels):
    """As if it had seen each of them alone; one whose grid too few have is left out."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 4), (4, 2), (2, 2), (2, 4), (2, 4), (4, 2), (4, 2), (2, 4), (4, 2), (2, 4)]
    images = [(size, torch.randn(8, channels, generator=generator).double()[: size[0] * size[1]]) for size in sizes]
    cut = cut_of(case_named(name).model())
    found = skipat_surgery.cka(cut, [given(name, images)], progress=False)
    expected = MinibatchCKA()
    with torch.no_grad():
        for size in ((2, 4), (4, 2)):
            alike = [pixels_of(given(name, [image])) for image in images if image[0] == size]
            z = [z_of(Tower.of(cut), range(6), image) for image in alike]
            expected.add(torch.stack([gram(torch.cat([each[index] for each in z])) for index in range(6)]))
    torch.testing.assert_close(found.msa, expected.value())
    assert found.images == 9
    with pytest.raises(ValueError, match="no batch of at least 4 images of one size, which CKA needs"):
        skipat_surgery.cka(cut, [given(name, images[:5])], progress=False)


@torch.no_grad()
def test_cka_of_packed_images_of_one_size_is_that_of_images_and_not_of_patches():
    tower = case_named("Qwen3VLVisionModel").model()
    images = case_named("Qwen3VLVisionModel").images(batch=6)
    z = z_of(Tower.of(tower), range(6), images)
    expected = MinibatchCKA()
    expected.add(torch.stack([gram(z[index]) for index in range(6)]))
    found = skipat_surgery.cka(tower, [images], progress=False)
    torch.testing.assert_close(found.msa, expected.value())
    assert found.images == 6
