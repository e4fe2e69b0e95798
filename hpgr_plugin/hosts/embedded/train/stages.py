"""The two stages: masked item modelling, then ranking from its hand-over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpgr_plugin.components.mim import MaskedItemModel
from hpgr_plugin.components.sharded_table import RowShardedTable
from hpgr_plugin.config.registry import ConfigError, build
from hpgr_plugin.data import (
    InteractionLog,
    PreparedData,
    SequenceBatch,
    check_sequences,
    check_splits,
    item_mean_scores,
)
from hpgr_plugin.data.events import require, require_fields
from hpgr_plugin.data.log import TRAIN
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker
from hpgr_plugin.hosts.embedded.report.evaluation import Task, inference_seconds, kept_tokens
from hpgr_plugin.hosts.embedded.train.checkpoint import load_checkpoint, load_weights
from hpgr_plugin.hosts.embedded.train.distributed import Process, barrier, seed_everything
from hpgr_plugin.hosts.embedded.train.losses import listwise_loss, pairwise_loss
from hpgr_plugin.hosts.embedded.train.planned import (
    Packed,
    PlannedRequests,
    PlannedSequences,
    RequestPlanner,
    SequencePlanner,
)
from hpgr_plugin.hosts.embedded.train.run_directory import CHECKPOINT
from hpgr_plugin.hosts.embedded.train.sharded_checkpoint import load_best_weights
from hpgr_plugin.hosts.embedded.train.shards import gather_blocks, sharded_tables
from hpgr_plugin.hosts.embedded.train.trainer import (
    Trainer,
    TrainingRun,
    TrainSettings,
)
from hpgr_plugin.transfer.handoff import save_handoff, save_handoff_in_blocks
from hpgr_plugin.transfer.learning_rates import parameter_groups

HELD_OUT_USERS = 0.05


@dataclass(frozen=True)
class PretrainSettings(TrainSettings):
    """`TrainSettings` of stage 1."""


@dataclass(frozen=True)
class FinetuneSettings(TrainSettings):
    """`TrainSettings` of stage 2, and losses that compare the candidates of a request.

    Attributes:
        pairwise_weight: of the logistic loss on pairs of a positive and a negative.
        listwise_weight: of the softmax over a request's candidates.
        frozen_sem_epochs: first epochs in which a pre-trained SEM keeps the weights of stage 1; 0
            without one.
        task_weights: of the losses of further tasks, by name; 1 for those that are not named. That
            of the main task is 1. Each task's loss has the parts above.
    """

    pairwise_weight: float = 0.0
    listwise_weight: float = 0.0
    frozen_sem_epochs: int = 0
    task_weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fields(self, 0, "pairwise_weight", "listwise_weight", "frozen_sem_epochs")
        for task, weight in self.task_weights.items():
            binding = f"FinetuneSettings.task_weights[{task!r}]"
            require(0 < weight < math.inf, binding, "a number above 0", weight)

    def weights_of(self, tasks: Sequence[str]) -> list[float]:
        """The weights of the losses of the main task and these.

        Raises:
            ConfigError: a weight of another task.
        """
        for task in self.task_weights:
            if task not in tasks:
                raise ConfigError(
                    f"hpgr.FinetuneSettings.task_weights takes tasks of hpgr.HSTURanker.tasks, "
                    f"which are {list(tasks)}, got {task!r}"
                )
        return [1.0, *(self.task_weights.get(task, 1.0) for task in tasks)]

    def frozen_epochs_of(self, inherited: Sequence[str]) -> dict[str, int]:
        """Inherited name -> first epochs without a change.

        Raises:
            ConfigError: epochs for a SEM that stage 1 did not bring.
        """
        if not self.frozen_sem_epochs:
            return {}
        if "sem" not in inherited:
            raise ConfigError(
                f"hpgr.FinetuneSettings.frozen_sem_epochs = {self.frozen_sem_epochs} takes a "
                "pre-trained hpgr.HSTURanker.sem, and this model has none: bind it in the scopes "
                "of rows that have one"
            )
        return {"sem": self.frozen_sem_epochs}


@dataclass(frozen=True)
class Stage1:
    """A finished stage 1.

    Attributes:
        handoff: the hand-over that stage 2 starts from.
        metrics: validation loss and cost.
    """

    handoff: Path
    metrics: dict[str, Any]


def pretrain(task: Task, settings: PretrainSettings, run: TrainingRun) -> Stage1:
    """Stage 1: train a masked item model (Eq. 3) and write its hand-over.

    5% of the users are held out; training stops when the loss of their sequences stops falling.

    Args:
        task: data, and the requests of stage 2, which decide the form of SEM.
        settings: how it is trained.
        run: seed, folder and process.
    """
    seed_everything(run.seed)
    data, process = task.data, run.process
    model = build_stage1(data).to(process.device)
    task.decide_causal(model.sem)
    held_out = np.random.default_rng(run.seed).random(data.log.num_users) < HELD_OUT_USERS
    sequences = {"prepared": data, "max_length": model.max_sequence_length, "seed": run.seed}
    train = build(
        "SequenceLoader",
        **sequences,
        users=~held_out,
        rank=process.rank,
        world_size=process.world_size,
    )
    check_sequences(train)
    validation = build("SequenceLoader", **sequences, users=held_out)

    planner = SequencePlanner(model, process.device)

    def prepare(batch: SequenceBatch, step: int) -> PlannedSequences | Packed[PlannedSequences]:
        masks = torch.Generator().manual_seed(_mask_seed(run.seed, step, process.rank))
        return planner.plan(batch, masks)

    def loss(forward: nn.Module, batch: PlannedSequences, step: int) -> tuple[Tensor, int]:
        output = batch.output_of(forward)
        return output.loss * output.num_masked, output.num_masked

    def validate() -> dict[str, float]:
        masks = torch.Generator().manual_seed(run.seed)
        sums = torch.zeros(2, dtype=torch.float64, device=process.device)
        masked = 0
        for batch in validation.map_batches(lambda batch, _: planner.plan(batch, masks)):
            output = batch.to(process.device).output_of(model)
            sums += torch.stack([output.loss, output.accuracy]).double() * output.num_masked
            masked += output.num_masked
        losses, hits = sums.tolist()  # the only wait for the device
        return {"loss": losses / max(1, masked), "accuracy": hits / max(1, masked)}

    trainer = Trainer(
        model=model,
        groups=parameter_groups(
            model, inherited=(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        ),
        loader=train,
        loss=loss,
        prepare=prepare,
        validate=validate,
        monitor=("loss", False),
        settings=settings,
        run=replace(run, stage="pretrain"),
    )
    cost = trainer.fit()
    handoff = run.output_dir / "handoff.safetensors"
    _write_handoff(handoff, model, data.log, process)
    barrier()
    return Stage1(handoff, cost | trainer.best)


def finetune(
    task: Task,
    settings: FinetuneSettings,
    run: TrainingRun,
    *,
    pretrained: Path | None = None,
) -> dict[str, Any]:
    """Stage 2: train a ranker by binary cross entropy (Eq. 6).

    Args:
        task: data, requests and metrics.
        settings: how it is trained.
        run: seed, folder and process.
        pretrained: hand-over of stage 1; None leaves the slot to gin.

    Returns:
        Test metrics of the weights with the best validation AUC, cost, and the validations.

    Raises:
        ConfigError: see `build_ranker` and the settings' `weights_of` and `frozen_epochs_of`.
    """
    check_splits(task.data, task.requests)
    seed_everything(run.seed)
    model = build_ranker(task, pretrained=pretrained)
    task = replace(task, statistics=model.reads_statistics)
    train = task.loader("train", seed=run.seed)
    validation = task.loader("validation")

    weights = settings.weights_of(model.task_names)

    planner = RequestPlanner(model, run.process.device)

    def loss(forward: nn.Module, planned: PlannedRequests, step: int) -> tuple[Tensor, int]:
        logits, batch = planned.logits_of(forward).float().unbind(), planned.batch
        labels = [batch.candidate_labels, *(batch.task_labels[name] for name in model.task_names)]
        most = planned.plan.requests.most_candidates
        losses = [
            weight * task_loss(of_task, label, batch.candidate_offsets, settings, most)
            for weight, of_task, label in zip(weights, logits, labels, strict=True)
        ]
        return torch.stack(losses).sum(), batch.num_candidates

    trainer = Trainer(
        model=model,
        groups=parameter_groups(
            model,
            inherited=model.inherited,
            lr=settings.learning_rate,
            inherited_lr_ratio=model.inherited_lr_ratio,
            weight_decay=settings.weight_decay,
            frozen_epochs=settings.frozen_epochs_of(model.inherited),
        ),
        loader=train,
        loss=loss,
        prepare=lambda batch, _: planner.plan(batch),
        validate=lambda: task.metrics(task.score(model, validation)),
        monitor=("auc", True),
        settings=settings,
        run=run,
    )
    cost = trainer.fit()
    metrics = _test_metrics(model, task, run.output_dir)
    return metrics | cost | {"history": trainer.progress.history}


def task_loss(
    logits: Tensor,
    labels: Tensor,
    offsets: Tensor,
    settings: FinetuneSettings,
    most_candidates: int | None = None,
) -> Tensor:
    """Sum over candidates of one task's binary cross entropy, and of what `settings` adds to it.

    Args:
        logits: `[C]`.
        labels: `[C]`, 0 or 1.
        offsets: `[B + 1]` of the requests, into the candidates.
        settings: weights of the losses inside a request.
        most_candidates: of a request; None: the device is asked for it.
    """
    total = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    for weight, in_request in (
        (settings.pairwise_weight, pairwise_loss),
        (settings.listwise_weight, listwise_loss),
    ):
        if weight:
            total = total + weight * in_request(logits, labels, offsets, most_candidates)
    return total


def evaluate(task: Task, output_dir: Path) -> dict[str, Any]:
    """Test metrics of the best weights in the checkpoint of `output_dir`."""
    check_splits(task.data, task.requests, ["test"])
    model = build_ranker(task)
    task = replace(task, statistics=model.reads_statistics)
    if sharded_tables(model):
        load_best_weights(output_dir, model, task.process)
    else:
        path = output_dir / CHECKPOINT
        load_weights(path, model, load_checkpoint(path, task.process.device)["best_model"])
    return _test_metrics(model, task)


def item_mean(task: Task, output_dir: Path | None = None) -> dict[str, Any]:
    """Test metrics of the smoothed mean label of each item: the baseline of every table.

    Args:
        task: data, requests and metrics.
        output_dir: folder for the predictions; None writes none.
    """
    scored = item_mean_scores(task.data, "test", task.requests)
    if output_dir is not None:
        task.save_predictions(scored, output_dir)
    return task.metrics(scored)


def build_stage1(data: PreparedData) -> MaskedItemModel:
    """The configured masked item model for this data, on the CPU."""
    known = arguments_from_data(data)
    model: MaskedItemModel = build(
        "MaskedItemModel",
        **{name: known[name] for name in ("num_items", "num_actions", "item_feature_codes")},
        item_events=known["item_counts"],
    )
    return model


def build_ranker(task: Task, *, pretrained: Path | None = None) -> HSTURanker:
    """The configured ranker for this data, on the process's device.

    Raises:
        ConfigError: a component does not fit, or SEM would show candidates their own future.
    """
    slot = {} if pretrained is None else {"pretrained": str(pretrained)}
    model: HSTURanker = build("HSTURanker", **arguments_from_data(task.data), **slot)
    if task.requests.max_history > model.max_history:
        raise ConfigError(
            f"hpgr.RequestSettings.max_history = {task.requests.max_history} is more than "
            f"hpgr.HSTURanker.max_history = {model.max_history}"
        )
    task.decide_causal(model.sem)
    if model.attention_hook is not None:
        model.attention_hook.decide_layout(
            max_history=task.requests.max_history,
            max_candidates=task.requests.max_candidates,
        )
    return model.to(task.process.device)


def arguments_from_data(data: PreparedData) -> dict[str, Any]:
    """What `HSTURanker` takes from the log and not from the configuration."""
    log = data.log
    return {
        "num_items": log.num_items,
        "num_actions": log.num_actions,
        "vocabulary_digest": log.item_vocabulary_digest,
        "user_feature_sizes": {n: f.num_values for n, f in log.user_features.items()},
        "item_feature_codes": {
            n: torch.from_numpy(np.array(f.codes)) for n, f in log.item_features.items()
        },
        "item_counts": torch.from_numpy(
            np.bincount(log.item[data.split == TRAIN], minlength=log.num_items)
        ),
        "task_names": list(log.task_labels),
    }


def _test_metrics(model: HSTURanker, task: Task, output_dir: Path | None = None) -> dict[str, Any]:
    """Metrics and cost on the test split; writes the predictions where a folder is given."""
    model.eval()
    test = task.loader("test")
    scored = task.score(model, test)
    if output_dir is not None:
        task.save_predictions(scored, output_dir)
    metrics: dict[str, Any] = task.metrics(scored)
    return metrics | {
        "kept_tokens": kept_tokens(model, test, task.process),
        "inference_seconds_per_step": inference_seconds(model, test, task.process),
    }


def _write_handoff(
    path: Path, model: MaskedItemModel, log: InteractionLog, process: Process
) -> None:
    """Write the hand-over; a sharded table goes through the first process block by block."""
    table = model.item_table
    common: dict[str, Any] = {
        "sem": model.sem,
        "vocabulary_digest": log.item_vocabulary_digest,
        "gap_seconds": model.gap_seconds,
    }
    if not isinstance(table, RowShardedTable):
        if process.is_main:
            save_handoff(
                path,
                item_table=table.weight,
                item_features=model.item_features,
                extra=_source_ids(log),
                **common,
            )
        return
    blocks = gather_blocks(table)
    if not process.is_main:
        for _ in blocks:  # sends its rows
            pass
        return
    save_handoff_in_blocks(
        path,
        blocks=blocks,
        shape=(table.num_embeddings, table.embedding_dim),
        item_ids=torch.from_numpy(log.item_ids.astype(np.int64)) if _are_numbers(log) else None,
        **common,
    )


def _source_ids(log: InteractionLog) -> dict[str, Any]:
    """The item ids of the source if they are numbers: another host may use the same ids."""
    return {"item_ids": log.item_ids.tolist()} if _are_numbers(log) else {}


def _are_numbers(log: InteractionLog) -> bool:
    return np.issubdtype(log.item_ids.dtype, np.integer)


def _mask_seed(seed: int, step: int, rank: int) -> int:
    """An own seed for every (seed, step, rank), so that a resumed training masks the same items."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
