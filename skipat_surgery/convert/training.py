"""The training loop of a distillation, on any number of processes, resumable to the bit."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from ..observing import Outputs
from ..tasks.finding import task_of
from ..tower import Tower
from .finite import check_loss
from .losses import distances, distillation_loss, label_loss, mixup
from .optimizers import optimizers
from .rates import STEPS, probe
from .settings import TrainingConfig
from .sharing import outputs_of_both, train_mode
from .stream import Share, Stream, Streamed


class Training:
    """A distillation in progress: the student and all that must be saved to go on with it.

    Args:
        student: The cut model.
        teacher: The model it learns from, on the accelerator's device, in evaluation mode.
        accelerator: What places and wraps everything.
        config: How to train.
        progress: How far the run has come.
        share: Whether the teacher is the very model that was cut: what lies before the first skipped block is then run
            once for both.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        accelerator: Accelerator,
        config: TrainingConfig,
        progress: Progress,
        share: bool = False,
    ) -> None:
        self.share, self.task = share, task_of(student)
        self.plain, self.teacher, self.accelerator, self.config = student, teacher, accelerator, config
        self.progress = progress
        self.unread = 0
        self.tower, self.teacher_tower = Tower.of(student), Tower.of(teacher)
        average = get_ema_multi_avg_fn(config.ema_decay)
        self.ema = AveragedModel(student, multi_avg_fn=average) if config.ema_decay else None
        # What the steps run: see `outputs_of`. DDP would wait for the gradients of anything else that it wraps.
        runs = self.tower.module if self.task is None else self.task.called(student)
        prepared = accelerator.prepare(runs, *self._optimizers(1.0))
        self.student, self.optimizers = prepared[0], prepared[1:]
        self.schedules = [
            get_cosine_schedule_with_warmup(optimizer.optimizer, config.warmup_steps, config.max_steps)
            for optimizer in self.optimizers
        ]
        for item in (progress, *self.schedules, *filter(None, [self.ema])):
            accelerator.register_for_checkpointing(item)

    def _optimizers(self, scale: float) -> list[torch.optim.Optimizer]:
        config = self.config
        return optimizers(
            self.plain,
            learning_rate=scale * config.learning_rate,
            muon_learning_rate=scale * config.muon_learning_rate,
            weight_decay=config.weight_decay,
        )

    def choose_rates(self, loader: DataLoader) -> float:
        """Scale the rates of a run that has not begun, as the config says or as the first steps of a trial suggest.

        Args:
            loader: What `loader` gave. Each process tries on its share, and the smallest scale is taken.
        """
        scale = self.config.rate_scale
        if scale is None:
            self._train_mode()
            batches = list(islice(loader, STEPS + 1))
            found = probe(self.plain, self._loss_of, self._optimizers, batches, self.config.max_grad_norm)
            every = self.accelerator.gather(torch.tensor([found], device=self.accelerator.device))
            scale = round(float(every.min()), 4)
        for schedule in self.schedules:
            schedule.base_lrs = [scale * rate for rate in schedule.base_lrs]
            for group in schedule.optimizer.param_groups:
                group["initial_lr"] *= scale
                group["lr"] *= scale
        self.progress.rate_scale = scale
        return scale

    @property
    def result(self) -> nn.Module:
        """The model to measure and save: the moving average where there is one."""
        return self.plain if self.ema is None else self.ema.module

    def loader(self, items: torch.utils.data.Dataset | Streamed, collate: Callable[[Any], Any]) -> DataLoader:
        """The batches from the present step to the last, this process's share."""
        config, accelerator = self.config, self.accelerator
        per_step = config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        total, start = config.max_steps * per_step, self.progress.step * per_step
        given: dict[str, Any] = {"collate_fn": collate, "num_workers": config.num_workers, "drop_last": True}
        if isinstance(items, Streamed):
            places = accelerator.process_index, accelerator.num_processes
            loader = DataLoader(Share(items, start, total, config.batch_size, *places), config.batch_size, **given)
            # A share is one process's own already.
            return prepare_data_loader(loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True)
        stream = Stream(len(items), total, config.seed, start)  # type: ignore[arg-type]
        return accelerator.prepare(DataLoader(items, config.batch_size, sampler=stream, **given))

    def fit(
        self, loader: DataLoader, measure: Callable[[int], None], save: Callable[[int], None] | None = None
    ) -> None:
        """Train to the last step, with a progress bar.

        Args:
            loader: What `loader` gave.
            measure: Called with the step on the schedule of evaluation, on every process.
            save: Called with the step on the schedule of checkpoints, on every process.
        """
        config, progress = self.config, self.progress
        self._train_mode()
        bar = tqdm(
            total=config.max_steps,
            initial=progress.step,
            desc="Distilling",
            unit="step",
            disable=not self.accelerator.is_local_main_process,
        )
        micro_step = progress.step * config.gradient_accumulation_steps
        started = time.perf_counter()
        losses: list[float] = []
        with bar:
            for batch in loader:
                losses.append(self._step(batch, micro_step))
                micro_step += 1
                if not self.accelerator.sync_gradients:
                    continue
                progress.step += 1
                progress.seconds += time.perf_counter() - started
                bar.update()
                if progress.step % config.log_steps == 0:
                    bar.set_postfix(loss=self._log(losses))
                    losses = []
                ends = progress.step == config.max_steps
                if ends or progress.step % config.eval_steps == 0:
                    measure(progress.step)
                    self._train_mode()
                if ends or progress.step % config.checkpoint_steps == 0:
                    self._count_unread()
                    if save is not None and not ends:
                        save(progress.step)
                started = time.perf_counter()

    def _step(self, batch: dict[str, torch.Tensor], micro_step: int) -> float:
        """One batch forward and backward, and the optimisers' step where one is due; returns the loss."""
        config, accelerator = self.config, self.accelerator
        # Dropout and mixing draw from here: a function of the step and the process, whatever ran before.
        torch.manual_seed(config.seed + micro_step * accelerator.num_processes + accelerator.process_index)
        generator = torch.Generator().manual_seed(torch.initial_seed())
        images = mixup(batch["pixel_values"], config.mixup, generator)
        with accelerator.accumulate(self.student):
            loss = self._loss_of({**batch, "pixel_values": images}, self.student)
            accelerator.backward(loss)
            value = float(loss.detach())
            float16 = accelerator.mixed_precision == "fp16"
            check_loss(value, self.progress.step + 1, self.plain, self.teacher, images, float16=float16)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(self.student.parameters(), config.max_grad_norm)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            torch.clear_autocast_cache()  # inside autocast, the next step would run on the weights before this one
            if accelerator.sync_gradients:
                for schedule in self.schedules:
                    schedule.step()
                if self.ema is not None:
                    self.ema.update_parameters(self.plain)
        self.unread += int((~batch["valid"]).sum())
        return value

    def _loss_of(self, batch: dict[str, torch.Tensor], student: nn.Module | None = None) -> torch.Tensor:
        """The loss of a batch, with a gradient."""
        config = self.config
        with self.accelerator.autocast():
            found, expected = self._run_both(batch["pixel_values"], self.plain if student is None else student)
        terms = distances(found, expected, self.tower.num_special_tokens, config.temperature)
        if config.label_weight and found.logits is not None:
            terms["labels"] = label_loss(found.logits, batch["labels"])
        return distillation_loss(terms, config.loss_weights, batch["valid"])

    def _run_both(self, images: torch.Tensor, student: nn.Module) -> tuple[Outputs, Outputs]:
        """What student and teacher make of the same images."""
        first, depth = self.tower.first_changed, len(self.tower.blocks)
        same_depth = depth == len(self.teacher_tower.blocks)
        states = range(first, depth - 1) if self.config.block_weight and same_depth else ()
        return outputs_of_both(
            (student, self.tower), (self.teacher, self.teacher_tower), images, states, share=self.share, task=self.task
        )

    def _train_mode(self) -> None:
        """Training mode, where there is to be one."""
        train_mode(self.student, self.tower, self.task)

    def _count_unread(self) -> None:
        """Add the corrupt images that each process met to the common count."""
        mine = torch.tensor(self.unread, device=self.accelerator.device)
        self.progress.corrupt += int(self.accelerator.reduce(mine, "sum"))
        self.unread = 0

    def _log(self, losses: list[float]) -> str:
        """Log the mean loss of the last steps, over all processes."""
        mean = torch.tensor(losses, device=self.accelerator.device).mean()
        loss = float(self.accelerator.reduce(mean, "mean"))
        rate = self.schedules[0].get_last_lr()[0]
        self.record({"loss": loss, "learning_rate": rate})
        return f"{loss:.4f}"

    def record(self, values: dict[str, float]) -> None:
        """Add figures of the present step to the history and the trackers."""
        here = {"step": self.progress.step, "seconds": round(self.progress.seconds, 2)}
        self.progress.history.append({**here, **values})
        self.accelerator.log(values, step=self.progress.step)


@dataclass
class Progress:
    """How far a run has come: accelerate saves and loads it with the rest.

    `best` says of the best model so far at which stage and step it was, and its figures on the sample.
    """

    step: int = 0
    seconds: float = 0.0
    corrupt: int = 0
    rate_scale: float = 1.0
    best: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Read what `state_dict` gave."""
        vars(self).update(state)
