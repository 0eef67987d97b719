"""Train a cut model from scratch, as the paper does, beside the untouched one: steps and time to the same loss.

    python examples/pretrain.py                                # supervised, on scikit-learn's digits
    python examples/pretrain.py --method dino                  # without labels (pip install lightly)
    python examples/pretrain.py --dataset cifar10/train.parquet --image_size 32 --patch_size 2 --steps 600

Both arms start from the same weights and see the same images, step by step by turns, so that their times compare. The
cut one has the paper's Φ, which starts by reusing Z.
"""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import timm
import torch
from datasets import Dataset, load_dataset
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2
from tqdm.auto import tqdm
from transformers import HfArgumentParser, get_cosine_schedule_with_warmup

import skipat_surgery
from skipat_surgery import PhiConfig
from skipat_surgery.commands import digits
from skipat_surgery.commands.options import parse_skip
from skipat_surgery.precision import multiplies_bf16


@dataclass(frozen=True)
class Arguments:
    method: str = field(default="supervised", metadata={"help": "supervised, or dino."})
    dataset: str = field(default="", metadata={"help": "A parquet file with `image`, and `label` where supervised."})
    image_size: int = 32
    patch_size: int = 4
    dim: int = 96
    depth: int = 12
    skip: str = "3-8"
    batch_size: int = 64
    steps: int = 200
    learning_rate: float = 1e-3
    window: int = field(default=20, metadata={"help": "Losses are averages of as many steps."})


class Arm:
    """A model on its way: what it is trained by, its losses, and the seconds that it took."""

    def __init__(self, model: nn.Module, loss_of: Callable[[nn.Module, list[Tensor], Tensor], Tensor], args: Arguments):
        self.model, self.loss_of = model, loss_of
        self.optimizer = create_optimizer_v2(model, opt="adamw", lr=args.learning_rate, weight_decay=0.05)
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, args.steps // 10, args.steps)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, views: list[Tensor], labels: Tensor) -> None:
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bf16(torch.device("cpu"))):
            loss = self.loss_of(self.model, views, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - began)


class Dino(nn.Module):
    """DINO (arXiv 2104.14294), of the pieces of `lightly`: a head, and a teacher that follows the student."""

    def __init__(self, backbone: nn.Module, dim: int, steps: int, prototypes: int = 1024) -> None:
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead

        super().__init__()
        self.student, follower = (
            nn.Sequential(part, DINOProjectionHead(dim, 256, 64, prototypes))
            for part in (backbone, copy.deepcopy(backbone))
        )
        follower.load_state_dict(self.student.state_dict())
        self.followed = [follower.requires_grad_(False)]  # a list: no part of this module's own
        self.criterion, self.steps, self.step = DINOLoss(prototypes, warmup_teacher_temp_epochs=0), steps, 0

    def loss(self, views: list[Tensor]) -> Tensor:
        from lightly.models.utils import update_momentum
        from lightly.utils.scheduler import cosine_schedule

        update_momentum(self.student, self.followed[0], m=cosine_schedule(self.step, self.steps, 0.99, 1.0))
        self.step += 1
        with torch.no_grad():
            expected = [self.followed[0](view).float() for view in views[:2]]
        return self.criterion(expected, [self.student(view).float() for view in views], epoch=self.step)


def supervised_loss(model: nn.Module, views: list[Tensor], labels: Tensor) -> Tensor:
    return F.cross_entropy(model(views[0]).float(), labels)


def batches(data: Dataset, args: Arguments) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Random images with their labels; two views of each for DINO."""
    draws, number = torch.Generator().manual_seed(0), 2 if args.method == "dino" else 1
    scale = (0.4, 1.0) if args.method == "dino" else (0.7, 1.0)
    view = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomResizedCrop(args.image_size, scale=scale, antialias=True),
            v2.RandomHorizontalFlip(0.5 if args.dataset else 0.0),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.25] * 3),
        ]
    )
    for _ in range(args.steps):
        rows = data[torch.randint(len(data), (args.batch_size,), generator=draws).tolist()]
        images = [image.convert("RGB") for image in rows["image"]]
        views = [torch.stack([view(image) for image in images]) for _ in range(number)]
        yield views, torch.tensor(rows.get("label", [0] * len(images)))


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    torch.manual_seed(0)
    data = (
        load_dataset("parquet", data_files=args.dataset, split="train")
        if args.dataset
        else digits.load_digits()["train"]
    )
    classes = data.features["label"].num_classes if args.method == "supervised" else 0
    untouched = timm.create_model(
        "vit_tiny_patch16_224", img_size=args.image_size, patch_size=args.patch_size, embed_dim=args.dim,
        depth=args.depth, num_heads=args.dim // 32, num_classes=classes,
    )  # fmt: skip
    cut = skipat_surgery.apply(copy.deepcopy(untouched), parse_skip(args.skip), PhiConfig.paper(), keep_removed=False)
    models = {"untouched": untouched, "cut": cut}
    if args.method == "dino":
        models = {name: Dino(model, args.dim, args.steps) for name, model in models.items()}
    loss_of = supervised_loss if args.method == "supervised" else lambda model, views, _: model.loss(views)
    arms = {name: Arm(model.train(), loss_of, args) for name, model in models.items()}
    for number, (views, labels) in enumerate(tqdm(batches(data, args), total=args.steps, unit="step")):
        for name in sorted(arms, reverse=bool(number % 2)):
            arms[name].step(views, labels)
    say(arms, args.window)


def say(arms: dict[str, Arm], window: int) -> None:
    """Print the losses, and when the cut arm had the loss that the untouched one ended with."""
    smooth = {name: torch.tensor(arm.losses).unfold(0, window, 1).mean(dim=1).tolist() for name, arm in arms.items()}
    for name, arm in arms.items():
        pace = 1000 * torch.tensor(arm.seconds).median()
        print(f"{name}: loss {smooth[name][-1]:.4f} after {len(arm.losses)} steps, {pace:.0f} ms a step")
    goal = smooth["untouched"][-1]
    there = next((step for step, loss in enumerate(smooth["cut"]) if loss <= goal), None)
    whole = sum(arms["untouched"].seconds)
    if there is None:
        print(f"the cut one did not come to {goal:.4f}")
    else:
        share = sum(arms["cut"].seconds[: there + window]) / whole
        print(f"the cut one had {goal:.4f} after {there + window} steps, in {share:.0%} of the untouched one's time")


if __name__ == "__main__":
    main()
