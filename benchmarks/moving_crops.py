"""A small VideoMAE-shaped classifier, untouched and cut: in which of eight directions a clip moves over its photo.

    python benchmarks/moving_crops.py

The clips are crops that move over real photos. The classifier is trained first, on photos of
`../shared/data/photos`; each cut of it is solved and distilled on clips of the same photos, and measured on clips of
`../shared/data/discovery`. What was trained is kept in --output_dir, and a second call goes on where the first was.
"""

from __future__ import annotations

import copy
import math
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from denoiser import pixels_of
from subjects import SHARED, bf16, dtype_named, rows_of, speeds_of
from torch import Tensor, nn
from training import train
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

import skipat_surgery
from skipat_surgery import Evaluator, PhiConfig
from skipat_surgery.commands.machine import keep_freed_memory, machine, quiet_libraries
from skipat_surgery.commands.options import parse, parse_skip
from skipat_surgery.convert.settings import option
from skipat_surgery.core.tables import markdown_table
from skipat_surgery.measure.timing import Estimate

DIRECTIONS, BATCH = 8, 32
PHOTOS = 500  # of each set
PACES = (1.0, 3.0)  # pixels a frame
FIGURES = ("top1", "agreement", "kl", "patch_cosine")
PHIS = {
    "clusters": PhiConfig(),
    "clusters, patches ask": PhiConfig(queries="patches"),
    "Z alone": PhiConfig(pool=0, reads_x=False),
    "paper": PhiConfig.paper(),
}


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    skip: str = option("2-6", "Blocks to cut, of the eight from 0 to 7.")
    side: int = option(48, "Pixels a side of a clip, of patches of 8.")
    frames: int = option(8, "Frames of a clip, of tubelets of 2.")
    width: int = option(128, "Width of the classifier.")
    train_steps: int = option(600, "Steps of 32 clips that the classifier is trained for.")
    solve_clips: int = option(256, "Clips that a cut is solved on.")
    steps: int = option(100, "Steps of 32 clips that a cut is distilled for.")
    test_clips: int = option(1024, "Clips that are measured on.")
    rounds: int = option(15, "How often each model is timed, on 8 clips.")
    output_dir: str = option("outputs/moving_crops", "Where everything is written.")


class Clips:
    """Clips (B, T, 3, H, W) of photos, with their directions (B,).

    Args:
        photos: (3, H, W) each, from 0 to 1, no side shorter than a clip's and the way it moves.
        frames: T.
        side: H and W.
    """

    def __init__(self, photos: list[Tensor], frames: int, side: int) -> None:
        self.frames, self.side = frames, side
        least = side + math.ceil(PACES[1] * (frames - 1))
        self.photos = [photo for photo in photos if min(photo.shape[1:]) > least]

    def draw(self, count: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random ones, of random directions and paces."""
        labels = torch.randint(DIRECTIONS, (count,), generator=draws)
        return torch.stack([self._clip(int(label), draws) for label in labels]), labels

    def batches(self, count: int, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
        """So many batches of them, as the classifier takes them."""
        draws = torch.Generator().manual_seed(seed)
        for _ in range(count):
            clips, labels = self.draw(size, draws)
            yield {"pixel_values": clips, "labels": labels}

    def _clip(self, direction: int, draws: torch.Generator) -> Tensor:
        photo = self.photos[int(torch.randint(len(self.photos), (), generator=draws))]
        pace = PACES[0] + (PACES[1] - PACES[0]) * float(torch.rand((), generator=draws))
        angle = 2 * math.pi * direction / DIRECTIONS
        steps = pace * torch.arange(self.frames)
        places = torch.stack([steps * math.sin(angle), steps * math.cos(angle)], dim=1).round().long()
        places -= places.amin(dim=0)
        room = torch.tensor(photo.shape[1:]) - self.side - places.amax(dim=0)
        start = [int(torch.randint(int(size) + 1, (), generator=draws)) for size in room]
        corners = (places + torch.tensor(start)).tolist()
        return torch.stack([photo[:, y : y + self.side, x : x + self.side] for y, x in corners]) * 4 - 2


def classifier(args: Arguments) -> nn.Module:
    """Untrained."""
    torch.manual_seed(0)
    config = VideoMAEConfig(
        image_size=args.side, patch_size=8, num_frames=args.frames, tubelet_size=2, hidden_size=args.width,
        num_hidden_layers=8, num_attention_heads=4, intermediate_size=4 * args.width,
        id2label={direction: f"{360 // DIRECTIONS * direction}°" for direction in range(DIRECTIONS)},
    )  # fmt: skip
    return VideoMAEForVideoClassification(config)


def trained(args: Arguments, clips: Clips, file: Path) -> nn.Module:
    """The classifier with the weights of a file; trained, and the file written, where there is none."""
    model = classifier(args)

    def loss_of(step: int) -> Tensor:
        return model(**next(clips.batches(1, BATCH, seed=step))).loss

    train(model, file, args.train_steps, loss_of, learning_rate=1e-3, muon_learning_rate=1e-2, name="classifier")
    return model.eval()


class MovingCrops:
    """The classifier, its cuts, and what was measured of them."""

    def __init__(self, args: Arguments) -> None:
        self.args, self.output = args, Path(args.output_dir)
        self.output.mkdir(parents=True, exist_ok=True)
        self.clips, test = (
            Clips(pixels_of(rows_of(SHARED / "data" / file).select(range(PHOTOS))["image"]), args.frames, args.side)
            for file in ("photos/photos.parquet", "discovery/coco_mini.parquet")
        )
        self.teacher = trained(args, self.clips, self.output / "classifier.safetensors")
        self.test = list(test.batches(args.test_clips // BATCH, BATCH, seed=1))
        self.rows: dict[str, dict[str, float]] = {}

    def run(self) -> None:
        """Cut, measure, time."""
        measure = Evaluator(self.teacher, labelled=True)
        self.rows["untouched"] = measure(self.teacher, self.test)
        models = {"untouched": self.teacher, **{name: self.cut(name, phi, measure) for name, phi in PHIS.items()}}
        clips = self.test[0]["pixel_values"][:8].to(dtype_named(None))
        speeds = speeds_of(models, clips, self.args.rounds, max_seconds=120, untouched="untouched")
        where = f"`python {shlex.join(sys.argv)}`, {machine(torch.device('cpu'))}, torch {torch.__version__}"
        text = f"{self.table(speeds)}\n\n{where}\n"
        (self.output / "moving_crops.md").write_text(text)
        print(text)

    def cut(self, name: str, phi: PhiConfig, measure: Evaluator) -> nn.Module:
        """A cut of the classifier, solved and measured, distilled without labels and measured again."""
        args = self.args
        student = skipat_surgery.apply(copy.deepcopy(self.teacher), parse_skip(args.skip), phi, keep_removed=False)
        fitting = list(self.clips.batches(args.solve_clips // BATCH, BATCH, seed=2))
        with bf16():
            skipat_surgery.solve(student, self.teacher, fitting)
            self.rows[f"{name}, solved"] = measure(student, self.test)
            training = list(self.clips.batches(args.steps + 1, BATCH, seed=3))
            skipat_surgery.distill(student, self.teacher, training, steps=args.steps)
            self.rows[f"{name}, distilled"] = measure(student, self.test)
        return student

    def table(self, speeds: dict[str, Estimate]) -> str:
        """A row for each model."""
        rows = []
        for name, found in self.rows.items():
            speed = speeds[name.rpartition(", ")[0] or name]
            rows.append(
                [
                    name,
                    *(f"{found[figure]:.4f}" for figure in FIGURES),
                    speed.as_speed(),
                ]
            )
        return markdown_table(["moving crops", *(figure.replace("_", " ") for figure in FIGURES), "speed"], rows)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    (args,) = parse((Arguments,), sys.argv[1:] if argv is None else argv, "A video classifier, untouched and cut.")
    quiet_libraries()
    keep_freed_memory()
    MovingCrops(args).run()


if __name__ == "__main__":
    main()
