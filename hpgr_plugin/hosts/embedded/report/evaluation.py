"""Stage 2's task: which requests are ranked, and how scores are measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.config.registry import build
from hpgr_plugin.data import PreparedData, RequestLoader, RequestSettings
from hpgr_plugin.data.baselines import Scored
from hpgr_plugin.data.log import sessions_per_user
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker
from hpgr_plugin.hosts.embedded.train.distributed import Process, gather_arrays
from hpgr_plugin.metrics import ranking_metrics

MANY_SESSIONS = 5


@dataclass(frozen=True)
class Task:
    """Ranking the requests of prepared data.

    Attributes:
        data: prepared data.
        requests: how candidates are put together into requests.
        process: this process among its peers.
        session_gap_seconds: longest pause inside a session, for the AUC of users with many
            sessions.
    """

    data: PreparedData
    requests: RequestSettings
    process: Process
    session_gap_seconds: int = 1800

    def loader(self, split: str, *, seed: int = 0) -> RequestLoader:
        """This process's batches of a split; `seed` fixes their order in training."""
        loader: RequestLoader = build(
            "RequestLoader",
            prepared=self.data,
            split=split,
            settings=self.requests,
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

    def metrics(self, scored: Scored) -> dict[str, float]:
        """Ranking metrics, and the AUC of users with `MANY_SESSIONS` sessions or more."""
        metrics = ranking_metrics(scored.labels, scored.scores, scored.users)
        log = self.data.log
        sessions = sessions_per_user(log.user_offsets, log.timestamp, self.session_gap_seconds)
        many = sessions[scored.users.astype(np.int64)] >= MANY_SESSIONS
        if many.any() and len(np.unique(scored.labels[many])) == 2:
            chosen = ranking_metrics(*(column[many] for column in scored))
            metrics["auc_many_sessions"] = chosen["auc"]
        return metrics

    @torch.no_grad()
    def score(self, model: nn.Module, loader: RequestLoader) -> Scored:
        """Probabilities for every candidate of `loader`, from all processes."""
        labels, scores, users = [], [], []
        for batch in loader.batches():
            labels.append(batch.candidate_labels.numpy())
            logits = model(batch.to(self.process.device))
            scores.append(logits.float().sigmoid().cpu().numpy())
            users.append(np.repeat(batch.users.numpy(), batch.candidate_offsets.diff().numpy()))
        parts = [np.concatenate(part) if part else np.zeros(0) for part in (labels, scores, users)]
        scored = Scored(*gather_arrays(parts))
        if not np.isfinite(scored.scores).all():
            raise HpgrError(
                "the scores are not numbers: the training diverged; try a smaller "
                "hpgr.FinetuneSettings.learning_rate or weight_decay"
            )
        return scored


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
    for number, batch in enumerate(loader.batches()):
        if number == max_batches:
            break
        moved = batch.to(process.device)
        plan = model.plan(
            moved, model.embed_items(moved.history_items), model.embed_items(moved.candidate_items)
        )
        if plan is None:
            return 1.0
        kept += plan.index.numel()
        per_user = hook.layout == "per_user"
        seen += moved.history_items.numel() if per_user else int(model.visible(moved).sum())
    hook.eval()
    return kept / max(1, seen)
