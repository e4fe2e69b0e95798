"""Training loop of both stages: warm-up, clipping, early stopping, checkpoints, logs."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from hpgr_plugin.data.batches import Loader
from hpgr_plugin.data.events import require, require_fields
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.embedded.train.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_weights,
    restore_generators,
    save_checkpoint,
)
from hpgr_plugin.hosts.embedded.train.distributed import Process
from hpgr_plugin.hosts.embedded.train.run_directory import CHECKPOINT
from hpgr_plugin.hosts.embedded.train.sharded_checkpoint import ShardedCheckpoints
from hpgr_plugin.hosts.embedded.train.shards import (
    clip_gradients,
    data_parallel,
    sharded_tables,
)
from hpgr_plugin.ops.collectives import sum_over_processes

LOG = logging.getLogger(__name__)
LOG_EVERY = 10  # steps between the losses that TensorBoard shows
LOSSES_PER_WAIT = 20  # of them are copied from the device at a time


@dataclass(frozen=True)
class TrainSettings:
    """How a stage is trained.

    Attributes:
        epochs: most passes over the training data.
        learning_rate: of AdamW after the warm-up, for weights that are not inherited.
        weight_decay: of AdamW.
        warmup_steps: steps over which the learning rate rises linearly.
        decay: lower the learning rate along half a cosine to a tenth, over `epochs`.
        clip_norm: largest norm of the gradient.
        evaluations_per_epoch: validations per epoch.
        patience: validations without a better result before training stops.
        autocast: bfloat16 autocast on CUDA.
        checkpoint_every: steps between checkpoints; 0 writes one per epoch only.

    Raises:
        HpgrError: a value out of its range.
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
        require_fields(self, 1, "epochs", "evaluations_per_epoch", "patience")
        require_fields(self, 0, "weight_decay", "warmup_steps", "checkpoint_every")
        for name in ("learning_rate", "clip_norm"):
            value = getattr(self, name)
            fits = 0 < value < math.inf
            require(fits, f"{type(self).__name__}.{name}", "a number above 0", value)


@dataclass(frozen=True)
class TrainingRun:
    """One training: its seed, and where it writes.

    Attributes:
        seed: of the initial weights, the order of the batches, masks and dropout.
        output_dir: folder of the checkpoint, TensorBoard files and the hand-over.
        process: this process among its peers.
        title: label of the progress bar and the log.
        resume: continue from the checkpoint in `output_dir`, if there is one.
        stage: which stage it is, so that no stage continues from another's checkpoint.
    """

    seed: int
    output_dir: Path
    process: Process
    title: str = "training"
    resume: bool = False
    stage: str = "finetune"


@dataclass
class Progress:
    """State of a training; all of it is in the checkpoint."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best: float = -math.inf
    since_best: int = 0
    seconds: float = 0.0
    examples: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(kw_only=True, eq=False)
class Trainer:
    """Trains a model and keeps the weights of the best validation.

    Attributes:
        model: on its device.
        groups: parameter groups of the optimizer, each with its learning rate after warm-up; in
            its first "frozen_epochs", if it has that entry, a group keeps its weights.
        loader: the batches.
        loss: `(model, batch, step) -> (sum of losses, number of terms)`.
        prepare: `(batch, step) -> batch`, run ahead of the step on the loader's thread; what it
            makes has a method `to(device)`. None takes the batches as they are.
        validate: computes the validation metrics; called on every process.
        monitor: name of the metric that decides, and whether more is better.
        settings: how it is trained.
        run: seed, folder, process, title.
        progress: state of the training.
        start_counts: validate before the first step too, so that the weights it starts from are
            kept where no training improves on them.
    """

    model: nn.Module
    groups: list[dict[str, Any]]
    loader: Loader[Any]
    loss: Callable[[nn.Module, Any, int], tuple[Tensor, int]]
    validate: Callable[[], dict[str, float]]
    monitor: tuple[str, bool]
    settings: TrainSettings
    run: TrainingRun
    progress: Progress = field(default_factory=Progress)
    prepare: Callable[[Any, int], Any] | None = None
    start_counts: bool = False

    def __post_init__(self) -> None:
        self.process = self.run.process
        self.optimizer = torch.optim.AdamW(
            self.groups,
            weight_decay=self.settings.weight_decay,
            fused=True if self.process.device.type == "cuda" else None,
        )
        for group in self.optimizer.param_groups:
            group["full_lr"] = group["lr"]
        self.best_state: dict[str, Tensor] = {}
        self._total = sum(self.loader.num_batches(e) for e in range(self.settings.epochs))
        self._writer: SummaryWriter | None = None
        self._clock = 0.0
        self._losses: dict[int, Tensor] = {}
        self._forward = self.model
        self._sharded: ShardedCheckpoints | None = None
        if sharded_tables(self.model):
            self._sharded = ShardedCheckpoints(
                self.run.output_dir,
                model=self.model,
                optimizer=self.optimizer,
                process=self.process,
            )
        if self.process.world_size > 1:
            self._forward = data_parallel(self.model)

    def fit(self) -> dict[str, float]:
        """Train to the end and load the weights of the best validation into the model.

        Returns:
            The cost: "steps", "seconds_per_step" (with loading, without validation) and
            "examples_per_second" (terms of the loss, over all processes).
        """
        if self.run.resume:
            self._resume()
        if self.process.is_main:
            # Events after the checkpoint are dropped: their steps are trained again.
            folder, step = str(self.run.output_dir / "tb"), self.progress.step
            self._writer = SummaryWriter(folder, purge_step=step + 1 if step else None)
        bar = tqdm(
            total=self._total,
            initial=self.progress.step,
            desc=self.run.title,
            disable=None if self.process.is_main else True,
            leave=False,
        )
        with bar:
            if self.start_counts and not self.progress.history:
                self._clock = time.perf_counter()
                self._evaluate()
            self._forward.train()  # every module: parts of a loaded model are in evaluation mode
            while not self._finished():
                self._epoch(bar)
        if self._writer is not None:
            self._writer.close()
        if self._sharded is not None:
            self._sharded.wait()
        self.model.load_state_dict(self.best_state)
        progress = self.progress
        return {
            "steps": progress.step,
            "seconds_per_step": progress.seconds / max(1, progress.step),
            "examples_per_second": progress.examples / max(1e-9, progress.seconds),
        }

    @property
    def best(self) -> dict[str, float]:
        """Step and metrics of the best validation."""
        name, more_is_better = self.monitor
        return (max if more_is_better else min)(self.progress.history, key=lambda row: row[name])

    @property
    def _checkpoint(self) -> Path:
        return self.run.output_dir / CHECKPOINT

    def _finished(self) -> bool:
        done = self.progress.epoch >= self.settings.epochs
        return done or self.progress.since_best >= self.settings.patience

    def _epoch(self, bar: tqdm) -> None:
        progress, settings = self.progress, self.settings
        batches = self.loader.num_batches(progress.epoch)
        every = max(1, math.ceil(batches / settings.evaluations_per_epoch))
        self._clock = time.perf_counter()
        for batch in self._batches():
            loss = self._step(batch)
            progress.batch += 1
            bar.update()
            if progress.step % LOG_EVERY == 0:
                self._losses[progress.step] = loss
            if len(self._losses) >= LOSSES_PER_WAIT:
                self._log_losses()
            if progress.batch % every == 0 and progress.batch < batches:
                self._evaluate()
            if settings.checkpoint_every and progress.step % settings.checkpoint_every == 0:
                self._stop_clock()
                self._save()
            if self._finished():
                self._save()
                return
        self._evaluate()
        progress.epoch += 1
        progress.batch = 0
        self._save()

    def _batches(self) -> Iterator[Any]:
        """The rest of the epoch's batches, prepared."""
        progress, prepare = self.progress, self.prepare
        if prepare is None:
            return self.loader.batches(progress.epoch, start=progress.batch)
        first = progress.step - progress.batch  # the step of the epoch's first batch
        return self.loader.map_batches(
            lambda batch, number: prepare(batch, first + number), progress.epoch, progress.batch
        )

    def _step(self, batch: Any) -> Tensor:
        if not self.model.training:  # after a validation; it visits every module
            self._forward.train()
        factor = self._learning_rate_factor()
        for group in self.optimizer.param_groups:
            frozen = self.progress.epoch < group.get("frozen_epochs", 0)
            group["lr"] = 0.0 if frozen else factor * group["full_lr"]
        batch = batch.to(self.process.device)
        with self._autocast():
            loss_sum, terms = self.loss(self._forward, batch, self.progress.step)
        # Processes have different numbers of terms: the mean is over all of them.
        # Not torch.tensor, which waits for the device to copy the number there.
        terms_everywhere = sum_over_processes(torch.full((), float(terms), device=loss_sum.device))
        loss = loss_sum / terms_everywhere.clamp(min=1)
        self.optimizer.zero_grad(set_to_none=True)
        (loss * self.process.world_size).backward()
        clip_gradients(self.model, self.settings.clip_norm)
        self.optimizer.step()
        self.progress.step += 1
        self.progress.examples += terms * self.process.world_size
        return loss.detach()

    def _learning_rate_factor(self) -> float:
        """Linear warm-up, then half a cosine down to a tenth."""
        step, warmup = self.progress.step + 1, self.settings.warmup_steps
        if step <= warmup:
            return step / warmup
        if not self.settings.decay:
            return 1.0
        share = (step - warmup) / max(1, self._total - warmup)
        return 0.55 + 0.45 * math.cos(math.pi * min(1.0, share))

    def _autocast(self) -> AbstractContextManager:
        if self.process.device.type == "cuda" and self.settings.autocast:
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return nullcontext()

    def _stop_clock(self) -> None:
        """Count the time since the clock started: loading and steps, not validation."""
        if self.process.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.progress.seconds += now - self._clock
        self._clock = now

    def _evaluate(self) -> None:
        progress, title = self.progress, self.run.title
        self._stop_clock()
        self.model.eval()
        with torch.no_grad(), self._autocast():
            metrics = self.validate()
        progress.history.append({"step": progress.step, **metrics})
        if self.process.is_main:
            text = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            LOG.info("%s: step %d, %.0f s, %s", title, progress.step, progress.seconds, text)
        self._log({f"validation/{name}": value for name, value in metrics.items()})
        name, more_is_better = self.monitor
        score = metrics[name] if more_is_better else -metrics[name]
        if math.isnan(score):
            raise HpgrError(
                f"{title}: validation {name} is not a number at step {progress.step}: the training "
                f"diverged; try a smaller hpgr.{type(self.settings).__name__}.learning_rate"
            )
        progress.since_best += 1
        if score > progress.best or not self.best_state:
            progress.best, progress.since_best = score, 0
            state = self.model.state_dict()
            self.best_state = {key: value.detach().clone() for key, value in state.items()}
        self._clock = time.perf_counter()

    def _log(self, values: Mapping[str, float]) -> None:
        """Write scalars for TensorBoard."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, self.progress.step)

    def _log_losses(self) -> None:
        """Write the losses since the last call, with one wait for the device.

        All processes call it: a loss is the sum of what they hold.
        """
        if self._losses:
            values = sum_over_processes(torch.stack(list(self._losses.values())))
            if self._writer is not None:
                for step, value in zip(self._losses, values.tolist(), strict=True):
                    self._writer.add_scalar("train/loss", value, step)
        self._losses.clear()

    def _save(self) -> None:
        self._log_losses()
        state = {"stage": self.run.stage, "progress": vars(self.progress)}
        if self._sharded is not None:
            self._sharded.save(self.best_state, state)
            return
        parts = {
            "model": self.model.state_dict(),
            "best_model": self.best_state,
            "optimizer": self.optimizer.state_dict(),
        }
        save_checkpoint(self._checkpoint, {**state, **parts}, self.process)

    def _resume(self) -> None:
        """Continue from the checkpoint, if there is one."""
        if self._sharded is None:
            if self._checkpoint.exists():
                self._restore()
        elif (path := self._sharded.latest()) is not None:
            state, self.best_state = self._sharded.restore(path)
            self._check_stage(path, state["stage"])
            self.progress = Progress(**state["progress"])
            if state["world_size"] != self.process.world_size:
                self._renumber(state["world_size"])

    def _renumber(self, writers: int) -> None:
        """Count batches and steps as this number of processes takes them, not as `writers` did.

        Every process takes another share of an epoch. The learning rate goes on where it was.
        """
        progress, loader = self.progress, self.loader
        before = [loader.num_batches(epoch) for epoch in range(progress.epoch)]
        done = progress.batch * writers // self.process.world_size
        progress.batch = min(done, loader.num_batches(progress.epoch))
        progress.step = sum(before) + progress.batch

    def _check_stage(self, path: Path, stage: str) -> None:
        if stage != self.run.stage:
            raise CheckpointError(f"{path} is of stage {stage!r}, this is {self.run.stage!r}")

    def _restore(self) -> None:
        path = self._checkpoint
        state = load_checkpoint(path, self.process.device)
        self._check_stage(path, state["stage"])
        load_weights(path, self.model, state["model"])
        self.best_state = state["best_model"]
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.progress = Progress(**state["progress"])
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise CheckpointError(f"{path} is of another training: {error}") from error
        restore_generators(path, state["generators"], self.process)
