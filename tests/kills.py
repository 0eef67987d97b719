"""Kills: the recipe is killed at random moments, resumed, and must end where a run that was left alone ends.

    python tests/kills.py --runs 50

Each run is SIGKILLed once, at a moment drawn over the whole of it, and then resumed to its end. Its weights, `last/`
and `best/`, must equal those of the undisturbed run to the bit, and the files of its results must be whole.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import transformers
from PIL import Image
from small_models import SHAPE
from tqdm import tqdm

from skipat_surgery.commands import distill

OPTIONS = (
    "--skip 2-4 --max_steps 12 --batch_size 8 --warmup_steps 2 --eval_steps 4 --checkpoint_steps 2 --solve_images 48"
)


def prepare(folder: Path) -> list[str]:
    """A small model and a folder of pictures; the recipe's options for them."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 8)):
        for label in "abc":
            place = folder / "pictures" / split / label
            place.mkdir(parents=True)
            for index in range(count):
                pixels = draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{index}.png")
    names = dict(enumerate("abc"))
    config = transformers.ViTConfig(**SHAPE, id2label=names, label2id={name: index for index, name in names.items()})
    transformers.set_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(folder / "model")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "model")
    return ["--model", str(folder / "model"), "--dataset", str(folder / "pictures"), *OPTIONS.split()]


def start(options: list[str], log: Path) -> int:
    """The recipe in a process forked from this one, which has all imports behind it; its number."""
    child = os.fork()
    if child:
        return child
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["distill.py", *options]
    status = 1
    try:
        distill.main()
        status = 0
    except SystemExit as done:
        status = int(done.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def finish(options: list[str], log: Path) -> None:
    """Run the recipe to its end."""
    _, status = os.waitpid(start(options, log), 0)
    if status:
        raise SystemExit(
            f"the recipe failed with status {os.waitstatus_to_exitcode(status)}:\n{log.read_text()[-3000:]}"
        )


def weights(output: Path) -> dict[str, str]:
    """The digests of the weights that a run left."""
    files = [output / name / "model.safetensors" for name in ("best", "last")]
    return {str(file.relative_to(output)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def reached(output: Path) -> str:
    """How far a run had come when it was killed."""
    if (output / "results.json").exists():
        return "results written"
    steps = sorted((output / "checkpoints").glob("step-????????")) if (output / "checkpoints").exists() else []
    if steps:
        return "training, with a checkpoint"
    return "training, without a checkpoint" if (output / "run.json").exists() else "before the first step was kept"


def main() -> None:
    """Kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, counts = random.Random(args.seed), collections.Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = prepare(folder)
        began = time.perf_counter()
        finish([*options, "--output_dir", str(folder / "whole")], folder / "whole.log")
        whole, seconds = weights(folder / "whole"), time.perf_counter() - began
        for number in tqdm(range(args.runs), desc="Kills", unit="run"):
            output, log = folder / str(number), folder / f"{number}.log"
            own = [*options, "--output_dir", str(output), "--resume"]
            child = start(own, log)
            time.sleep(draw.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            counts[reached(output)] += 1
            finish(own, log)
            assert weights(output) == whole, f"run {number} ended elsewhere"
            json.loads((output / "results.json").read_text())
    print(f"{args.runs} runs of {seconds:.0f} s, each killed once and resumed: all equal to the bit")
    for what, count in counts.most_common():
        print(f"{what:30} {count:4}")


if __name__ == "__main__":
    main()
