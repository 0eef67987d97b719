"""Random input, good and bad: whatever comes works, or is refused with an error that this library raised itself.

    python tests/fuzz.py --cases 10000

Every case is a function of the seed and its number, so that one that fails can be made again: ``--only NUMBER``.
"""

from __future__ import annotations

import argparse
import collections
import copy
import functools
import math
import random
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_data
import torch
import transformers
from small_models import SHAPE
from tqdm import tqdm

import skipat_surgery
from skipat_surgery import PhiConfig, SkipatConfig

PACKAGE = str(Path(skipat_surgery.__file__).parent)
ODD: tuple[Any, ...] = (None, True, -1, 0, 1.5, "2", b"", math.nan, math.inf, [], {}, 10**20, (), object())


@functools.cache
def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SHAPE, num_labels=5)).eval()


def _phi_arguments(draw: random.Random) -> dict[str, Any]:
    """Arguments of a `PhiConfig`, now and then an odd one."""
    good: dict[str, Callable[[], Any]] = {
        "expansion": lambda: draw.choice((0.125, 0.25, 1, 2.5, draw.uniform(0.125, 3))),
        "kernel_size": lambda: draw.choice((1, 3, 5, 7, 11)),
        "channel_attention": lambda: draw.random() < 0.5,
        "prefix": lambda: draw.choice(("attend", "mix", "pass")),
        "pool": lambda: draw.choice((0, 2, 3, 4, 9)),
        "queries": lambda: draw.choice(("clusters", "patches")),
        "reads_x": lambda: draw.random() < 0.5,
    }
    names = draw.sample(sorted(good), draw.randrange(len(good) + 1))
    return {name: draw.choice(ODD) if draw.random() < 0.1 else good[name]() for name in names}


def _skip(draw: random.Random) -> Any:
    """Blocks to skip, in every form that there is and some that there is not."""
    blocks = draw.sample(range(1, 6), draw.randrange(1, 6))
    odd = draw.choice(ODD)
    mixed = [*blocks, odd]
    return draw.choice(
        (blocks, blocks, blocks, tuple(blocks), set(blocks), iter(blocks), range(2, 5), mixed, odd, "3-5")
    )


def cut(draw: random.Random) -> None:
    """`apply` with any Φ and any blocks; what it takes must run, at any size, save its config and be restored."""
    phi = PhiConfig(**_phi_arguments(draw))
    model = skipat_surgery.apply(
        copy.deepcopy(_model()), _skip(draw), draw.choice((phi, phi, phi, None, draw.choice(ODD)))
    )
    height, width = (8 * draw.randrange(1, 9) for _ in range(2))
    images = torch.randn(draw.randrange(1, 3), 3, height, width)
    with torch.no_grad():
        logits = model(images, interpolate_pos_encoding=True).logits
    assert logits.shape == (len(images), 5), logits.shape
    assert logits.isfinite().all()
    config = model.config.skipat
    assert SkipatConfig.from_dict(config).to_dict() == config
    with torch.no_grad():
        restored = skipat_surgery.restore(model)(images, interpolate_pos_encoding=True).logits
        expected = _model()(images, interpolate_pos_encoding=True).logits
    assert torch.equal(restored, expected)


def stored(draw: random.Random) -> None:
    """`SkipatConfig.from_dict` of a damaged configuration."""
    data: Any = SkipatConfig({2: PhiConfig(), 4: PhiConfig.paper()}).to_dict()
    for _ in range(draw.randrange(1, 4)):
        place = draw.choice((data, data["phi"], *data["phi"].values())) if isinstance(data.get("phi"), dict) else data
        if not isinstance(place, dict) or not place:
            continue
        key = draw.choice([*place, "new", "3", "x"])
        if draw.random() < 0.3:
            place.pop(key, None)
        else:
            place[key] = draw.choice(ODD)
    SkipatConfig.from_dict(data)


KINDS: dict[str, Callable[[random.Random], None]] = {
    "cut": cut,
    "stored": stored,
    "pictures": fuzz_data.pictures,
    "folders": fuzz_data.folders,
    "tables": fuzz_data.tables,
}


def outcome(kind: str, number: int, seed: int) -> tuple[str, str]:
    """What became of a case, ``works``, ``refused`` or ``fault``, and for a fault its traceback."""
    draw = random.Random(f"{seed} {kind} {number}")
    torch.manual_seed(number)
    try:
        KINDS[kind](draw)
    except (ValueError, TypeError) as error:
        raised = traceback.extract_tb(error.__traceback__)[-1].filename
        if raised.startswith(PACKAGE) or "skipat_surgery" in raised:
            return "refused", ""
        return "fault", traceback.format_exc()
    except Exception:
        return "fault", traceback.format_exc()
    return "works", ""


def main() -> None:
    """Run the cases, and say what became of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="in all, shared among the kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="a single case of each kind")
    args = parser.parse_args()
    numbers = range(args.cases // len(KINDS)) if args.only is None else [args.only]
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for kind in KINDS:
        for number in tqdm(numbers, desc=kind, unit="case"):
            became, trace = outcome(kind, number, args.seed)
            counts[kind, became] += 1
            if became == "fault":
                print(f"{kind} {number}:\n{trace}")
    for (kind, became), count in sorted(counts.items()):
        print(f"{kind:10} {became:8} {count:6}")
    if any(became == "fault" for _, became in counts):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
