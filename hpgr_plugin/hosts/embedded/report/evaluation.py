"""Scores of a split and their figures."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from hpgr_plugin.data.baselines import Scored
from hpgr_plugin.data.batches import RequestLoader
from hpgr_plugin.data.log import sessions_per_user
from hpgr_plugin.data.prepared import PreparedData
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker
from hpgr_plugin.hosts.embedded.train.distributed import Process, gather_arrays
from hpgr_plugin.metrics import ranking_metrics

MANY_SESSIONS = 5


@torch.no_grad()
def score(model: nn.Module, loader: RequestLoader, process: Process) -> Scored:
    """Probabilities for every candidate of the loader, from all ranks."""
    labels, scores, users = [], [], []
    for batch in loader.batches():
        moved = batch.to(process.device)
        labels.append(batch.candidate_labels.numpy())
        scores.append(model(moved).float().sigmoid().cpu().numpy())
        users.append(np.repeat(batch.users.numpy(), batch.candidate_offsets.diff().numpy()))
    parts = [np.concatenate(part) if part else np.zeros(0) for part in (labels, scores, users)]
    return Scored(*gather_arrays(parts))


def figures_of(scores: Scored, data: PreparedData, gap_seconds: int = 1800) -> dict[str, float]:
    """Ranking metrics, and the AUC of the users with ``MANY_SESSIONS`` sessions or more."""
    figures = ranking_metrics(scores.labels, scores.scores, scores.users)
    sessions = sessions_per_user(data.log.user_offsets, data.log.timestamp, gap_seconds)
    many = sessions[scores.users.astype(np.int64)] >= MANY_SESSIONS
    if many.any() and len(np.unique(scores.labels[many])) == 2:
        chosen = ranking_metrics(scores.labels[many], scores.scores[many], scores.users[many])
        figures["auc_many_sessions"] = chosen["auc"]
    return figures


@torch.no_grad()
def kept_tokens(
    model: HSTURanker, loader: RequestLoader, process: Process, *, max_batches: int = 20
) -> float:
    """Share of the visible history that the attention hook keeps (1 without a hook).

    Stochastic length, which works in training alone, is asked as in training.
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
            moved, model.item_table(moved.history_items), model.item_table(moved.candidate_items)
        )
        if plan is None:
            return 1.0
        kept += plan.index.numel()
        per_user = hook.layout == "per_user"
        seen += moved.history_items.numel() if per_user else int(model.visible(moved).sum())
    hook.eval()
    return kept / max(1, seen)
