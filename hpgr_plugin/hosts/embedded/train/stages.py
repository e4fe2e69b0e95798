"""The two stages: masked item modelling, then ranking with what it handed over."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gin
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpgr_plugin.components.mim import MaskedItemModel
from hpgr_plugin.data.baselines import item_mean_scores
from hpgr_plugin.data.batch import Batch, SequenceBatch
from hpgr_plugin.data.batches import RequestLoader
from hpgr_plugin.data.log import InteractionLog
from hpgr_plugin.data.prepared import PreparedData
from hpgr_plugin.data.requests import RequestSettings
from hpgr_plugin.data.sequences import SequenceLoader
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker
from hpgr_plugin.hosts.embedded.report.evaluation import figures_of, kept_tokens, score
from hpgr_plugin.hosts.embedded.train.checkpoint import load_checkpoint
from hpgr_plugin.hosts.embedded.train.distributed import Process, barrier, seed_everything
from hpgr_plugin.hosts.embedded.train.trainer import CHECKPOINT, FitResult, Trainer, TrainSettings
from hpgr_plugin.transfer.handoff import save_handoff
from hpgr_plugin.transfer.learning_rates import parameter_groups

HELD_OUT_USERS = 0.05


@gin.configurable(module="hpgr")
@dataclass(frozen=True)
class PretrainSettings(TrainSettings):
    """:class:`TrainSettings` of stage 1."""


@gin.configurable(module="hpgr")
@dataclass(frozen=True)
class FinetuneSettings(TrainSettings):
    """:class:`TrainSettings` of stage 2."""


@dataclass(frozen=True)
class Stage1:
    """A finished stage 1.

    Attributes:
        handoff: the file that stage 2 starts from.
        figures: validation loss and cost.
    """

    handoff: Path
    figures: dict[str, Any]


def pretrain(
    data: PreparedData,
    *,
    seed: int,
    output_dir: Path,
    process: Process,
    resume: bool = False,
    title: str = "pretrain",
) -> Stage1:
    """Stage 1: train a :class:`MaskedItemModel` and write its hand-over.

    Sequences of 5% of the users are held out; training stops when their loss does not fall.
    """
    seed_everything(seed)
    settings = PretrainSettings()
    # the other sizes come from gin
    model = MaskedItemModel(num_items=data.log.num_items).to(process.device)  # type: ignore[call-arg]
    held_out = np.random.default_rng(seed).random(data.log.num_users) < HELD_OUT_USERS
    longest = model.max_sequence_length
    train = SequenceLoader(
        prepared=data,
        max_length=longest,
        users=~held_out,
        seed=seed,
        rank=process.rank,
        world_size=process.world_size,
    )
    validation = SequenceLoader(prepared=data, max_length=longest, users=held_out, seed=seed)

    def loss(forward: nn.Module, batch: SequenceBatch, step: int) -> tuple[Tensor, int]:
        masks = torch.Generator().manual_seed(_mask_seed(seed, step, process.rank))
        output = forward(batch.items, batch.offsets, batch.timestamps, generator=masks)
        return output.loss * output.num_masked, output.num_masked

    def validate(_: nn.Module) -> dict[str, float]:
        masks = torch.Generator().manual_seed(seed)
        losses = hits = masked = 0.0
        for batch in validation.batches():
            batch = batch.to(process.device)
            output = model(batch.items, batch.offsets, batch.timestamps, generator=masks)
            losses += output.loss.item() * output.num_masked
            hits += output.accuracy.item() * output.num_masked
            masked += output.num_masked
        return {"loss": losses / max(1, masked), "accuracy": hits / max(1, masked)}

    result = Trainer(
        model=model,
        groups=parameter_groups(
            model, inherited=(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        ),
        loader=train,
        loss=loss,
        validate=validate,
        monitor=("loss", False),
        settings=settings,
        output_dir=output_dir,
        process=process,
        title=title,
    ).fit(resume=resume)
    handoff = output_dir / "handoff.safetensors"
    if process.is_main:
        save_handoff(
            handoff,
            item_table=model.item_table.weight,
            sem=model.sem,
            vocabulary_digest=data.log.item_vocabulary_digest,
            gap_seconds=model.gap_seconds,
            extra=_host_ids(data.log),
        )
    barrier()
    return Stage1(handoff, _cost(result) | result.best)


def finetune(
    data: PreparedData,
    *,
    seed: int,
    output_dir: Path,
    process: Process,
    resume: bool = False,
    title: str = "finetune",
    pretrained: str | None = None,
) -> dict[str, Any]:
    """Stage 2: train an :class:`HSTURanker`, and the figures of its best weights on the test split.

    Args:
        data: prepared data.
        seed: fixes initial weights, order of batches and dropout.
        output_dir: checkpoint and TensorBoard files.
        process: this process among its peers.
        resume: go on from the last checkpoint.
        title: of the progress bar.
        pretrained: stage-1 hand-over; None leaves the slot to gin.
    """
    seed_everything(seed)
    settings = FinetuneSettings()
    model = build_ranker(data, pretrained=pretrained).to(process.device)
    train = _requests(data, "train", process, seed=seed)
    validation = _requests(data, "validation", process)

    def loss(forward: nn.Module, batch: Batch, step: int) -> tuple[Tensor, int]:
        logits = forward(batch)
        total = F.binary_cross_entropy_with_logits(
            logits.float(), batch.candidate_labels, reduction="sum"
        )
        return total, batch.num_candidates

    result = Trainer(
        model=model,
        groups=parameter_groups(
            model,
            inherited=model.inherited,
            lr=settings.learning_rate,
            inherited_lr_ratio=model.inherited_lr_ratio,
            weight_decay=settings.weight_decay,
        ),
        loader=train,
        loss=loss,
        validate=lambda _: figures_of(score(model, validation, process), data),
        monitor=("auc", True),
        settings=settings,
        output_dir=output_dir,
        process=process,
        title=title,
    ).fit(resume=resume)
    return _test_figures(model, data, process) | _cost(result) | {"history": result.history}


def evaluate(data: PreparedData, *, output_dir: Path, process: Process) -> dict[str, Any]:
    """Test figures of the best weights in ``output_dir``'s checkpoint."""
    state = load_checkpoint(output_dir / CHECKPOINT, process.device)
    model = build_ranker(data).to(process.device)
    model.load_state_dict(state["best_model"])
    return _test_figures(model, data, process)


def item_mean(data: PreparedData) -> dict[str, Any]:
    """Test figures of the smoothed mean label of each item: the floor of every table."""
    return figures_of(item_mean_scores(data, "test"), data)


def build_ranker(data: PreparedData, *, pretrained: str | None = None) -> HSTURanker:
    """The ranker that gin describes, for this data.

    Raises:
        ValueError: SEM would show candidates their own future.
    """
    log = data.log
    slot: dict[str, Any] = {} if pretrained is None else {"pretrained": pretrained}
    model = HSTURanker(
        num_items=log.num_items,
        num_actions=log.num_actions,
        vocabulary_digest=log.item_vocabulary_digest,
        user_feature_sizes={n: f.num_values for n, f in log.user_features.items()},
        item_feature_codes={
            n: torch.from_numpy(np.array(f.codes)) for n, f in log.item_features.items()
        },
        **slot,
    )
    requests = RequestSettings()
    shared = requests.history == "candidate" and requests.max_candidates > 1
    if shared and model.sem is not None and not model.sem.causal:
        raise ValueError(
            "hpgr.SessionEnhancementModule.causal must be True where candidates of different "
            "times share a history (hpgr.RequestSettings.history = 'candidate'): its context "
            "would hold what comes after the earlier candidates; or set history = 'request'"
        )
    return model


def _requests(data: PreparedData, split: str, process: Process, *, seed: int = 0) -> RequestLoader:
    return RequestLoader(
        prepared=data, split=split, seed=seed, rank=process.rank, world_size=process.world_size
    )


def _test_figures(model: HSTURanker, data: PreparedData, process: Process) -> dict[str, Any]:
    model.eval()
    test = _requests(data, "test", process)
    figures: dict[str, Any] = figures_of(score(model, test, process), data)
    return figures | {"kept_tokens": kept_tokens(model, test, process)}


def _host_ids(log: InteractionLog) -> dict[str, Any]:
    """The source's own item ids, where they are numbers: another host may know items by them."""
    ids = log.item_ids
    return {"item_ids": ids.tolist()} if np.issubdtype(ids.dtype, np.integer) else {}


def _cost(result: FitResult) -> dict[str, Any]:
    cost = asdict(result)
    del cost["best"], cost["history"]
    return cost


def _mask_seed(seed: int, step: int, rank: int) -> int:
    """A stream of its own for every (seed, step, rank), so that a resumed run masks alike."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
