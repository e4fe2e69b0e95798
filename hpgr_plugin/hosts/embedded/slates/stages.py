"""The stages `slates` (pre-training of a slate model) and `align` (preference alignment)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from hpgr_plugin.components.slates import alignment
from hpgr_plugin.components.slates.alignment import OBJECTIVES, Objective, SlateLogProbs
from hpgr_plugin.config.registry import ConfigError, build
from hpgr_plugin.data import Batch
from hpgr_plugin.data.events import require, require_fields
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.hosts.embedded.slates.artefact import (
    load_model,
    load_tokens,
    save_model,
)
from hpgr_plugin.hosts.embedded.slates.evaluation import (
    OUTCOMES,
    Outcomes,
    outcomes,
    save_outcomes,
)
from hpgr_plugin.hosts.embedded.slates.model import SlateModel, padded_labels, padded_slates
from hpgr_plugin.hosts.embedded.slates.worse import Diversity, WorseSlates
from hpgr_plugin.hosts.embedded.train.distributed import barrier, seed_everything
from hpgr_plugin.hosts.embedded.train.trainer import Trainer, TrainingRun, TrainSettings
from hpgr_plugin.transfer.learning_rates import parameter_groups

LOG = logging.getLogger(__name__)
MODEL = "slates.safetensors"
Loss = Literal["orpo", "dpo", "simpo"]


@dataclass(frozen=True)
class SlateSettings(TrainSettings):
    """`TrainSettings` of the pre-training of a slate model.

    Attributes:
        tokens: tokens.safetensors of the stage `tokenize`; None without a decoder.
    """

    tokens: str | None = None


@dataclass(frozen=True)
class AlignSettings(TrainSettings):
    """`TrainSettings` of preference alignment, and its loss.

    Attributes:
        model: slates.safetensors of the stage `slates`.
        tokens: tokens.safetensors, whose vectors say which items are similar.
        loss: "orpo", "dpo" or "simpo", see `components.slates.alignment`.
        alpha: weight of the odds in ORPO.
        beta: scale of DPO and SimPO.
        margin: of SimPO.
        objectives: which worse slates are drawn: "order", "interest", "diversity".
        diversity: "similar" takes items too similar to the first as the worse slate; "dissimilar"
            the other way round, as the paper's text reads.
    """

    epochs: int = 1
    learning_rate: float = 1e-4
    model: str | None = None
    tokens: str | None = None
    loss: Loss = "orpo"
    alpha: float = 0.1
    beta: float = 1.0
    margin: float = 0.5
    objectives: Sequence[Objective] = OBJECTIVES
    diversity: Diversity = "similar"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, takes in (("loss", get_args(Loss)), ("diversity", get_args(Diversity))):
            value = getattr(self, name)
            require(value in takes, f"AlignSettings.{name}", f"one of {list(takes)}", value)
        require_fields(self, 0, "alpha", "beta")
        fits = bool(self.objectives) and set(self.objectives) <= set(OBJECTIVES)
        require(fits, "AlignSettings.objectives", f"some of {list(OBJECTIVES)}", self.objectives)


@dataclass(frozen=True)
class TrainedSlates:
    """A finished stage.

    Attributes:
        model: the file that alignment and `SlateGenerator` start from.
        metrics: of the test split, and cost.
    """

    model: Path
    metrics: dict[str, Any]


def train_slates(
    task: Task, settings: SlateSettings, run: TrainingRun, *, pretrained: Path | None = None
) -> TrainedSlates:
    """Train a slate model by -log P of the slates that users took.

    Args:
        task: data and requests: the candidates of a request are a slate.
        settings: how it is trained.
        run: seed, folder and process.
        pretrained: hand-over of stage 1; None leaves the slot to gin.
    """
    seed_everything(run.seed)
    model = build_slate_model(task, tokens=settings.tokens, pretrained=pretrained)

    def loss(forward: nn.Module, batch: Batch, step: int) -> tuple[Tensor, int]:
        return cast("tuple[Tensor, int]", forward(batch))

    return _fit(model, task, settings, loss, replace(run, stage="slates"))


def align(task: Task, settings: AlignSettings, run: TrainingRun) -> TrainedSlates:
    """Align a trained slate model with feedback.

    y+ is the slate with its liked items first; slates without a liked item are left out. The model
    that it starts from is validated too and kept where no alignment is better; the metric
    "kept_start" says so.

    Args:
        task: as in `train_slates`.
        settings: how it is trained.
        run: seed, folder and process.

    Raises:
        HpgrError: no model or no tokens, or they are of other items.
    """
    seed_everything(run.seed)
    source, vectors = settings.model, settings.tokens
    if source is None or vectors is None:
        name = "model" if source is None else "tokens"
        raise HpgrError(f"hpgr.AlignSettings.{name} takes a file of the stage before, got None")
    start, _ = load_model(Path(source))
    digest = task.data.log.item_vocabulary_digest
    if start.settings["vocabulary_digest"] != digest:
        raise HpgrError(f"{source} is of other items than those of the data")
    aligned = start.to(run.process.device)
    found = load_tokens(Path(vectors), vocabulary_digest=digest)
    worse = WorseSlates(
        task.data,
        found.vectors,
        run,
        slate_size=aligned.slate_size,
        objectives=settings.objectives,
        diversity=settings.diversity,
    )
    reference = copy.deepcopy(aligned).requires_grad_(False) if settings.loss == "dpo" else None
    wrapped = _Alignment(aligned, reference, worse, settings)

    def loss(forward: nn.Module, batch: Batch, step: int) -> tuple[Tensor, int]:
        return cast("tuple[Tensor, int]", forward(batch, step))

    return _fit(wrapped, task, settings, loss, replace(run, stage="align"))


class _Alignment(nn.Module):
    """A slate model with the loss of its alignment; the weights of training are the model's."""

    def __init__(
        self,
        model: SlateModel,
        reference: SlateModel | None,
        worse: WorseSlates,
        settings: AlignSettings,
    ) -> None:
        super().__init__()
        self.model, self.worse, self.settings = model, worse, settings
        self._reference = [reference]  # no submodule: it is not trained and not saved

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, int]:
        """The sum of the losses over users with a liked item, and their number."""
        size = self.model.slate_size
        slates, lengths = padded_slates(batch, size)
        labels = padded_labels(batch, size)
        labels[torch.arange(size, device=labels.device) >= lengths.unsqueeze(1)] = -1
        better = alignment.by_feedback(slates, labels)
        worse = self.worse.draw(batch, better, lengths, step)
        losses = self._losses(batch, better, worse, lengths)
        liked = (labels > 0).any(1)
        return torch.where(liked, losses, 0.0).sum(), int(liked.sum())

    def _losses(self, batch: Batch, better: Tensor, worse: Tensor, lengths: Tensor) -> Tensor:
        pair = self._pair(self.model, batch, better, worse, lengths)
        settings, reference = self.settings, self._reference[0]
        if reference is not None:
            with torch.no_grad():
                first, second = self._pair(reference, batch, better, worse, lengths)
            totals = first.total(), second.total()
            return alignment.dpo_loss(*pair, totals, beta=settings.beta)
        if settings.loss == "simpo":
            return alignment.simpo_loss(*pair, beta=settings.beta, margin=settings.margin)
        return alignment.orpo_loss(*pair, alpha=settings.alpha)

    @staticmethod
    def _pair(
        model: SlateModel, batch: Batch, better: Tensor, worse: Tensor, lengths: Tensor
    ) -> tuple[SlateLogProbs, SlateLogProbs]:
        context = model.context(batch)
        return (
            model.log_probs_of(context, better, lengths),
            model.log_probs_of(context, worse, lengths),
        )


def build_slate_model(
    task: Task, *, tokens: str | Path | None = None, pretrained: Path | None = None
) -> SlateModel:
    """The configured slate model for this data, on the process's device.

    Raises:
        HpgrError: a component does not fit.
    """
    log = task.data.log
    slot = {} if pretrained is None else {"pretrained": str(pretrained)}
    ids = None
    if tokens is not None:
        found = load_tokens(Path(tokens), vocabulary_digest=log.item_vocabulary_digest)
        ids = found.ids
    model: SlateModel = build(
        "SlateModel",
        num_items=log.num_items,
        num_actions=log.num_actions,
        vocabulary_digest=log.item_vocabulary_digest,
        ids=ids,
        **slot,
    )
    requests = task.requests
    for name, here, there in (
        ("max_history", requests.max_history, model.max_history),
        ("max_candidates", requests.max_candidates, model.slate_size),
    ):
        if here > there:
            field = "slate_size" if name == "max_candidates" else name
            raise ConfigError(
                f"hpgr.RequestSettings.{name} = {here} is more than hpgr.SlateModel.{field} = "
                f"{there}"
            )
    if requests.history != "request":
        raise ConfigError(
            "hpgr.RequestSettings.history takes 'request' where requests are slates: a history "
            f"ends before the first item of its slate, got {requests.history!r}"
        )
    return model.to(task.process.device)


def _fit(
    trained: SlateModel | _Alignment,
    task: Task,
    settings: TrainSettings,
    loss: Any,
    run: TrainingRun,
) -> TrainedSlates:
    """Train, write the model and measure it on the test split."""
    model = trained if isinstance(trained, SlateModel) else trained.model
    validation = task.loader("validation")
    key = f"ndcg@{model.slate_size}"
    trainer = Trainer(
        model=trained,
        groups=parameter_groups(
            trained,
            inherited=() if isinstance(trained, _Alignment) else model.inherited,
            lr=settings.learning_rate,
            inherited_lr_ratio=model.inherited_lr_ratio,
            weight_decay=settings.weight_decay,
        ),
        loader=task.loader("train", seed=run.seed),
        loss=loss,
        validate=lambda: outcomes(model, validation, run.process).metrics(),
        monitor=(key, True),
        settings=settings,
        run=run,
        start_counts=isinstance(trained, _Alignment),
    )
    cost: dict[str, Any] = trainer.fit()
    if trainer.start_counts:
        cost["kept_start"] = trainer.best["step"] == 0
        if cost["kept_start"]:
            text = "%s: no validation has a better %s than before it: the start is kept"
            LOG.info(text, run.title, key)
    model.eval()
    path = run.output_dir / MODEL
    if run.process.is_main:
        save_model(path, model, item_ids=task.data.log.item_ids.tolist())
    test: Outcomes = outcomes(model, task.loader("test"), run.process)
    if run.process.is_main:
        save_outcomes(run.output_dir / OUTCOMES, test)
    barrier()
    history = {"history": trainer.progress.history}
    return TrainedSlates(path, {**test.metrics(), **cost, **history})
