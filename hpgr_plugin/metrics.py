"""Ranking metrics of one evaluation: AUC, GAUC, log loss, normalised entropy.

Scores are probabilities in [0, 1] (a sigmoid's output), so that one array serves all four.

GAUC is the mean of per-user AUC, weighted by each user's number of candidates ("impressions")
or equally ("users"). Users without both a positive and a negative candidate have no AUC and are
left out.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

# Keeps the log loss finite where a score of exactly 0 or 1 is wrong.
_EPSILON = 1e-7


def ranking_metrics(labels: Any, scores: Any, users: Any) -> dict[str, float]:
    """All metrics: "auc", "gauc" (impression-weighted), "log_loss", "ne".

    Args:
        labels: [C] 0 or 1; array or tensor on the CPU.
        scores: [C] probabilities.
        users: [C] whose candidate each is.

    Raises:
        ValueError: lengths differ, a label is not 0 or 1, or a score is no probability.
    """
    return {
        "auc": auc(labels, scores),
        "gauc": gauc(labels, scores, users),
        "log_loss": log_loss(labels, scores),
        "ne": normalized_entropy(labels, scores),
    }


def auc(labels: Any, scores: Any) -> float:
    """Area under the ROC curve, exact, ties averaged; NaN where only one label occurs.

    Args:
        labels: [C] 0 or 1.
        scores: [C] probabilities.
    """
    labels, scores = _checked(labels, scores)
    found = auc_by_group(labels, scores, np.zeros(len(labels), dtype=np.int64))
    return float(found.auc[0]) if len(found.auc) else math.nan


def gauc(labels: Any, scores: Any, users: Any, weighting: str = "impressions") -> float:
    """Weighted mean of per-user AUC; NaN where no user has both labels.

    Args:
        labels: [C] 0 or 1.
        scores: [C] probabilities.
        users: [C] whose candidate each is.
        weighting: "impressions" | "users".
    """
    if weighting not in ("impressions", "users"):
        raise ValueError(f"weighting is 'impressions' or 'users', got {weighting!r}")
    labels, scores = _checked(labels, scores)
    users = np.asarray(users)
    if users.shape != labels.shape:
        raise ValueError(f"users has shape {users.shape}, labels {labels.shape}")
    found = auc_by_group(labels, scores, np.unique(users, return_inverse=True)[1])
    if not len(found.auc):
        return math.nan
    weights = found.candidates if weighting == "impressions" else None
    return float(np.average(found.auc, weights=weights))


class GroupAUC(NamedTuple):
    """AUC of the groups that have both labels.

    Attributes:
        group: int64 [G], which groups they are.
        auc: float64 [G].
        candidates: int64 [G], how many each has.
    """

    group: np.ndarray
    auc: np.ndarray
    candidates: np.ndarray


def auc_by_group(labels: np.ndarray, scores: np.ndarray, group: np.ndarray) -> GroupAUC:
    """AUC inside every group (a user, an impression) that has both labels.

    Mann and Whitney: AUC = (R - n (n + 1) / 2) / (n m), where R is the sum of the ranks of the n
    positives among all n + m candidates of the group.

    Args:
        labels: bool [C].
        scores: float64 [C].
        group: int64 [C], 0..G-1.
    """
    counts = np.bincount(group)
    positives = np.bincount(group, weights=labels)
    rank_sum = np.bincount(group, weights=labels * _ranks_within(group, scores))
    both = np.flatnonzero((positives > 0) & (positives < counts))
    counts, positives, rank_sum = counts[both], positives[both], rank_sum[both]
    pairs = positives * (counts - positives)
    return GroupAUC(both, (rank_sum - positives * (positives + 1) / 2) / pairs, counts)


def log_loss(labels: Any, scores: Any) -> float:
    """Mean binary cross entropy (Eq. 6) in nats."""
    labels, scores = _checked(labels, scores)
    scores = np.clip(scores, _EPSILON, 1 - _EPSILON)
    return float(-np.where(labels, np.log(scores), np.log1p(-scores)).mean())


def normalized_entropy(labels: Any, scores: Any) -> float:
    """Log loss divided by that of predicting the mean label; below 1 is better than the mean."""
    labels, scores = _checked(labels, scores)
    mean = float(labels.mean())
    if mean in (0.0, 1.0):
        return math.nan
    entropy = -(mean * math.log(mean) + (1 - mean) * math.log(1 - mean))
    return log_loss(labels, scores) / entropy


def _ranks_within(user: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """1-based rank of each score among its user's [C]; equal scores get their mean rank."""
    order = np.lexsort((scores, user))
    sorted_user, sorted_scores = user[order], scores[order]
    new_user = np.ones(len(order), dtype=bool)
    new_user[1:] = sorted_user[1:] != sorted_user[:-1]
    new_value = new_user.copy()
    new_value[1:] |= sorted_scores[1:] != sorted_scores[:-1]
    value_start = np.flatnonzero(new_value)
    value_end = np.append(value_start[1:], len(order))
    user_start = np.flatnonzero(new_user)[np.cumsum(new_user) - 1]
    value = np.cumsum(new_value) - 1
    ranks = np.empty(len(order))
    ranks[order] = (value_start[value] + value_end[value] + 1) / 2 - user_start
    return ranks


def _checked(labels: Any, scores: Any) -> tuple[np.ndarray, np.ndarray]:
    """bool and float64 [C]."""
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if labels.shape != scores.shape or labels.ndim != 1 or not labels.size:
        raise ValueError(
            "labels and scores are one-dimensional, of one length and not empty, "
            f"got {labels.shape} and {scores.shape}"
        )
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels are 0 or 1, got others")
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError(
            f"scores are probabilities in [0, 1], got {scores.min()} to {scores.max()}"
        )
    return labels.astype(bool), scores
