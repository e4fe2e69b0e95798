"""Stage 2's task: which requests are ranked, and how scores are measured."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.config.registry import build
from hpgr_plugin.data import PreparedData, RequestLoader, RequestSettings
from hpgr_plugin.data.baselines import Scored
from hpgr_plugin.data.log import sessions_per_user
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker
from hpgr_plugin.hosts.embedded.report.predictions import (
    PREDICTIONS,
    Predictions,
    save_predictions,
    task_predictions,
)
from hpgr_plugin.hosts.embedded.report.table import task_metric
from hpgr_plugin.hosts.embedded.train.distributed import Process, gather_arrays
from hpgr_plugin.hosts.embedded.train.planned import RequestPlanner
from hpgr_plugin.hosts.embedded.train.shards import batches_of_all
from hpgr_plugin.metrics import ranking_metrics

MANY_SESSIONS = 5
GaucBy = Literal["user", "impression"]


@dataclass(frozen=True)
class Task:
    """Ranking the requests of prepared data.

    Attributes:
        data: prepared data.
        requests: how candidates are put together into requests.
        process: this process among its peers.
        session_gap_seconds: longest pause inside a session, for the AUC of users with many
            sessions.
        gauc_by: whose candidates GAUC compares: those of a user, or of an impression.
        statistics: whether batches carry the candidates' statistics.

    Raises:
        HpgrError: GAUC by impression, and the log has none.
    """

    data: PreparedData
    requests: RequestSettings
    process: Process
    session_gap_seconds: int = 1800
    gauc_by: GaucBy = "user"
    statistics: bool = False

    def __post_init__(self) -> None:
        if self.gauc_by == "impression" and self.data.log.group is None:
            raise HpgrError(
                "hpgr.run.gauc_by takes 'user' for a log without impressions, got 'impression'"
            )

    def loader(self, split: str, *, seed: int = 0) -> RequestLoader:
        """This process's batches of a split; `seed` fixes their order in training."""
        loader: RequestLoader = build(
            "RequestLoader",
            prepared=self.data,
            split=split,
            settings=self.requests,
            statistics=self.statistics,
            seed=seed,
            rank=self.process.rank,
            world_size=self.process.world_size,
        )
        return loader

    def decide_causal(self, sem: SessionEnhancementModule | None) -> None:
        """Let SEM take the form that these requests need, the same in both stages.

        Raises:
            HpgrError: `causal = False` where candidates of different times share a history.
        """
        if sem is not None:
            shared = self.requests.history == "candidate" and self.requests.max_candidates > 1
            sem.decide_causal(
                shared,
                "candidates of different times share a history "
                "(hpgr.RequestSettings.history = 'candidate')",
            )

    def groups(self, scored: Scored) -> np.ndarray:
        """Whose AUC GAUC is the mean of, for every candidate: int64 [C]."""
        group = self.data.log.group
        if self.gauc_by == "user" or group is None:
            return scored.users
        # The same impression shown to two users is two groups.
        code = np.unique(group[scored.rows], return_inverse=True)[1]
        pairs = scored.users.astype(np.int64) * len(code) + code
        return np.unique(pairs, return_inverse=True)[1]

    def metrics(self, scored: Scored) -> dict[str, float]:
        """Ranking metrics, and the AUC of users with `MANY_SESSIONS` sessions or more.

        Those of a further task have its name and a slash in front: "like/auc".
        """
        log, groups = self.data.log, self.groups(scored)
        metrics = ranking_metrics(scored.labels, scored.scores, groups)
        sessions = sessions_per_user(log.user_offsets, log.timestamp, self.session_gap_seconds)
        many = sessions[scored.users.astype(np.int64)] >= MANY_SESSIONS
        if many.any() and len(np.unique(scored.labels[many])) == 2:
            chosen = ranking_metrics(scored.labels[many], scored.scores[many], groups[many])
            metrics["auc_many_sessions"] = chosen["auc"]
        for task, of_task in scored.tasks.items():
            found = ranking_metrics(of_task.labels, of_task.scores, groups)
            metrics |= {task_metric(task, name): value for name, value in found.items()}
        return metrics

    def save_predictions(self, scored: Scored, directory: Path) -> None:
        """Write the scores of the test split to `directory`, in the order of the log.

        Those of a further task are a file of its own, "predictions_like.npz".
        """
        if not self.process.is_main:
            return
        self._save_task(scored, directory / PREDICTIONS)
        for task, of_task in scored.tasks.items():
            self._save_task(of_task, directory / task_predictions(task))

    def _save_task(self, scored: Scored, path: Path) -> None:
        order = np.argsort(scored.rows)
        columns = (scored.users, self.groups(scored), scored.labels, scored.scores)
        kinds = (np.int32, np.int64, np.int8, np.float32)
        arrays = [c[order].astype(k) for c, k in zip(columns, kinds, strict=True)]
        save_predictions(path, Predictions(*arrays))

    @torch.no_grad()
    def score(self, model: HSTURanker, loader: RequestLoader) -> Scored:
        """Probabilities for every candidate of `loader`, from all processes, of every task."""
        log, names = self.data.log, model.task_names
        parts = [torch.zeros(1 + len(names), 0, device=self.process.device)]
        parts += _probabilities(model, loader, self.process)
        columns = torch.cat(parts, 1).cpu().numpy()  # the only wait for the device
        rows, *scores = gather_arrays([loader.candidate_rows(), *columns])
        users = np.searchsorted(log.user_offsets, rows, side="right").astype(np.int32) - 1
        tasks = {
            name: Scored(log.task_labels[name][rows], of_task, users, rows)
            for name, of_task in zip(names, scores[1:], strict=True)
        }
        scored = Scored(log.label[rows], scores[0], users, rows, tasks)
        if not all(np.isfinite(each).all() for each in scores):
            raise HpgrError(
                "the scores are not numbers: the training diverged; try a smaller "
                "hpgr.FinetuneSettings.learning_rate or weight_decay"
            )
        return scored


@torch.no_grad()
def inference_seconds(
    model: HSTURanker, loader: RequestLoader, process: Process, *, max_batches: int = 20
) -> float:
    """Seconds per batch of scoring, with loading, over the first batches of `loader`."""
    start = time.perf_counter()
    parts = list(_probabilities(model, loader, process, max_batches))
    for part in parts:
        part.cpu()
    return (time.perf_counter() - start) / max(1, len(parts))


def _probabilities(
    model: HSTURanker, loader: RequestLoader, process: Process, most: int | None = None
) -> Iterator[torch.Tensor]:
    """Of every task and candidate, batch by batch, `[1 + tasks, C]` on the process's device."""
    planner = RequestPlanner(model, process.device)
    for planned in batches_of_all(model, loader, lambda b, _: planner.plan(b), most=most):
        yield planned.to(process.device).logits_of(model).float().sigmoid()


@torch.no_grad()
def kept_tokens(
    model: HSTURanker, loader: RequestLoader, process: Process, *, max_batches: int = 20
) -> float:
    """Share of the visible history that the attention hook keeps (1 without a hook).

    Stochastic length, which only works in training, is measured as in training.
    """
    hook = model.attention_hook
    if hook is None:
        return 1.0
    kept = seen = 0
    hook.train()
    planner = RequestPlanner(model, process.device)
    for planned in batches_of_all(model, loader, lambda b, _: planner.plan(b), most=max_batches):
        batch, (index, *_) = planned.to(process.device)
        plan = model.plan(batch, *model.embed_requests(batch), index)
        per_user = hook.layout == "per_user"
        here = batch.history_items.numel() if per_user else index.num_visible
        kept += here if plan is None else plan.index.numel()
        seen += here
    hook.eval()
    return kept / max(1, seen)
