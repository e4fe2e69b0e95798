"""The training loop of both stages: warm-up, clipping, early stopping, checkpoints, logs."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import gin
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from hpgr_plugin.hosts.embedded.train.checkpoint import load_checkpoint, save_checkpoint
from hpgr_plugin.hosts.embedded.train.distributed import Process, sum_over_ranks

LOG = logging.getLogger(__name__)
CHECKPOINT = "checkpoint.pt"


class Loader(Protocol):
    """Batches of one epoch, the same on every call, from any batch onwards."""

    def batches(self, epoch: int, *, start: int = 0) -> Iterator[Any]: ...

    def num_batches(self, epoch: int) -> int: ...


@gin.configurable(module="hpgr")
@dataclass(frozen=True)
class TrainSettings:
    """How a stage is trained.

    Attributes:
        epochs: passes over the training data at most.
        learning_rate: AdamW's, after warm-up, for fresh weights.
        weight_decay: AdamW's.
        warmup_steps: steps of linear warm-up; cosine decay to a tenth follows when ``decay``.
        decay: let the rate fall along a half cosine over the epochs asked for.
        clip_norm: gradient norm bound.
        evaluations_per_epoch: validations an epoch.
        patience: validations without a better figure before training stops.
        autocast: bfloat16 autocast on CUDA.
        checkpoint_every: steps between checkpoints, beside one an epoch (0: only that one).
    """

    epochs: int = 10
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup_steps: int = 50
    decay: bool = True
    clip_norm: float = 1.0
    evaluations_per_epoch: int = 1
    patience: int = 2
    autocast: bool = True
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "evaluations_per_epoch", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainSettings.{name} must be >= 1, got {getattr(self, name)}")


@dataclass
class Progress:
    """Where training stands; all of it is in the checkpoint."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best: float = -math.inf
    since_best: int = 0
    seconds: float = 0.0
    examples: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class FitResult:
    """What a training run brought: the best validation and its cost."""

    best: dict[str, float]
    steps: int
    seconds_per_step: float
    examples_per_second: float
    history: list[dict[str, float]]


class Trainer:
    """Trains ``model`` on ``loader`` and keeps the weights of the best validation.

    Args:
        model: what is trained, on its device already.
        groups: optimizer parameter groups, each with its full learning rate.
        loader: the batches.
        loss: ``(model, batch, step) -> (sum of losses, number of terms)``.
        validate: ``model -> figures``; called on every rank.
        monitor: the figure that decides, and whether more is better.
        settings: see :class:`TrainSettings`.
        output_dir: checkpoint and TensorBoard files go here.
        process: this process among its peers.
        title: what the progress bar shows.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        groups: list[dict[str, Any]],
        loader: Loader,
        loss: Callable[[nn.Module, Any, int], tuple[Tensor, int]],
        validate: Callable[[nn.Module], dict[str, float]],
        monitor: tuple[str, bool],
        settings: TrainSettings,
        output_dir: Path,
        process: Process,
        title: str,
    ) -> None:
        self.model = model
        self.loader = loader
        self.loss = loss
        self.validate = validate
        self.monitor = monitor
        self.settings = settings
        self.output_dir = output_dir
        self.process = process
        self.title = title
        self.optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
        for group in self.optimizer.param_groups:
            group["full_lr"] = group["lr"]
        self.progress = Progress()
        self.best_state: dict[str, Tensor] = {}
        self._clock = 0.0
        self.forward: nn.Module = model
        if process.world_size > 1:
            # A batch without history leaves some weights without a gradient.
            self.forward = DistributedDataParallel(model, find_unused_parameters=True)

    def fit(self, *, resume: bool = False) -> FitResult:
        """Train to the end, from the last checkpoint when ``resume`` and there is one."""
        path = self.output_dir / CHECKPOINT
        if resume and path.exists():
            self._restore(path)
        writer = SummaryWriter(str(self.output_dir / "tb")) if self.process.is_main else None
        total = sum(self.loader.num_batches(e) for e in range(self.settings.epochs))
        bar = tqdm(
            total=total,
            initial=self.progress.step,
            desc=self.title,
            disable=None if self.process.is_main else True,
            leave=False,
        )
        with bar:
            while not self._finished():
                self._epoch(writer, bar, total)
        if writer is not None:
            writer.close()
        self.model.load_state_dict(self.best_state)
        return self._result()

    def _finished(self) -> bool:
        done = self.progress.epoch >= self.settings.epochs
        return done or self.progress.since_best >= self.settings.patience

    def _epoch(self, writer: SummaryWriter | None, bar: tqdm, total: int) -> None:
        progress, settings = self.progress, self.settings
        batches = self.loader.num_batches(progress.epoch)
        every = max(1, math.ceil(batches / settings.evaluations_per_epoch))
        self._clock = time.perf_counter()
        for batch in self.loader.batches(progress.epoch, start=progress.batch):
            loss = self._step(batch, total)
            progress.batch += 1
            bar.update()
            if writer is not None and progress.step % 10 == 0:
                writer.add_scalar("train/loss", loss.item(), progress.step)
            if progress.batch % every == 0 and progress.batch < batches:
                self._evaluate(writer)
            if settings.checkpoint_every and progress.step % settings.checkpoint_every == 0:
                self._stop_clock()
                self._save()
            if self._finished():
                return
        self._evaluate(writer)
        progress.epoch += 1
        progress.batch = 0
        self._save()

    def _step(self, batch: Any, total: int) -> Tensor:
        self.forward.train()
        rate = self._rate(total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["full_lr"]
        batch = batch.to(self.process.device)
        with self._autocast():
            loss_sum, terms = self.loss(self.forward, batch, self.progress.step)
        # Ranks hold different numbers of terms: scale so that the mean is over all of them.
        terms_everywhere = sum_over_ranks(torch.tensor(float(terms), device=loss_sum.device))
        loss = loss_sum / terms_everywhere.clamp(min=1)
        self.optimizer.zero_grad(set_to_none=True)
        (loss * self.process.world_size).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        self.progress.step += 1
        self.progress.examples += terms * self.process.world_size
        return loss.detach()

    def _rate(self, total: int) -> float:
        """Linear warm-up, then half a cosine down to a tenth."""
        step, warmup = self.progress.step + 1, self.settings.warmup_steps
        if step <= warmup:
            return step / warmup
        if not self.settings.decay:
            return 1.0
        share = (step - warmup) / max(1, total - warmup)
        return 0.55 + 0.45 * math.cos(math.pi * min(1.0, share))

    def _autocast(self) -> AbstractContextManager:
        if self.process.device.type == "cuda" and self.settings.autocast:
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return nullcontext()

    def _stop_clock(self) -> None:
        """Count the training time since the clock started: loading and steps, not validation."""
        if self.process.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.progress.seconds += now - self._clock
        self._clock = now

    def _evaluate(self, writer: SummaryWriter | None) -> None:
        progress = self.progress
        self._stop_clock()
        self.model.eval()
        with torch.no_grad(), self._autocast():
            figures = self.validate(self.model)
        progress.history.append({"step": progress.step, **figures})
        if self.process.is_main:
            text = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            LOG.info("%s: step %d, %.0f s, %s", self.title, progress.step, progress.seconds, text)
        if writer is not None:
            for name, value in figures.items():
                writer.add_scalar(f"validation/{name}", value, progress.step)
        name, more_is_better = self.monitor
        score = figures[name] if more_is_better else -figures[name]
        if math.isnan(score):
            raise RuntimeError(f"{self.title}: validation {name} is NaN at step {progress.step}")
        progress.since_best += 1
        if score > progress.best or not self.best_state:
            progress.best, progress.since_best = score, 0
            state = self.model.state_dict()
            self.best_state = {key: value.detach().clone() for key, value in state.items()}
        self._clock = time.perf_counter()

    def _save(self) -> None:
        if not self.process.is_main:
            return
        save_checkpoint(
            self.output_dir / CHECKPOINT,
            {
                "model": self.model.state_dict(),
                "best_model": self.best_state,
                "optimizer": self.optimizer.state_dict(),
                "progress": vars(self.progress),
            },
        )

    def _restore(self, path: Path) -> None:
        state = load_checkpoint(path, self.process.device)
        self.model.load_state_dict(state["model"])
        self.best_state = state["best_model"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])

    def _result(self) -> FitResult:
        progress = self.progress
        name, more_is_better = self.monitor
        best = (max if more_is_better else min)(progress.history, key=lambda row: row[name])
        return FitResult(
            best=best,
            steps=progress.step,
            seconds_per_step=progress.seconds / max(1, progress.step),
            examples_per_second=progress.examples / max(1e-9, progress.seconds),
            history=progress.history,
        )
