"""Paired bootstrap by user: how far a difference of metrics depends on which users were drawn.

A resample draws as many users as there are, with replacement, and every prediction is measured on
the same draws. A user drawn w times counts as w copies of their candidates, so a resample is a
vector of weights, and AUC under weights is a sum of running totals: nothing is copied or sorted
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hpgr_plugin.hosts.embedded.report.predictions import Predictions
from hpgr_plugin.metrics import auc_by_group

METRICS = ("auc", "gauc")


class Interval(NamedTuple):
    """A value and its 95% interval."""

    value: float
    low: float
    high: float


class WeightedMetrics:
    """AUC and GAUC of one set of predictions under weights of its users.

    Args:
        predictions: C candidates.
        user: int64 [C], the user of each as 0..U-1.
    """

    def __init__(self, predictions: Predictions, user: np.ndarray) -> None:
        label, score = predictions.label.astype(bool), predictions.score.astype(np.float64)
        group = np.unique(predictions.group, return_inverse=True)[1]
        negative = np.flatnonzero(~label)[np.argsort(score[~label], kind="stable")]
        positive = np.flatnonzero(label)[np.argsort(score[label], kind="stable")]
        self._negative_user, self._positive_user = user[negative], user[positive]
        # Negatives below a positive, and those below or level with it: a tie counts half.
        self._below = np.searchsorted(score[negative], score[positive], side="left")
        self._up_to = np.searchsorted(score[negative], score[positive], side="right")
        found = auc_by_group(label, score, group)
        owner = np.zeros(len(label), dtype=np.int64)
        owner[group] = user
        self._group_user = owner[found.group]
        self._group_auc, self._group_count = found.auc, found.candidates

    def under(self, weights: np.ndarray) -> tuple[float, float]:
        """AUC and GAUC where user u counts weights[u] times, float64 [U]; NaN if undefined."""
        total = np.zeros(len(self._negative_user) + 1)
        np.cumsum(weights[self._negative_user], out=total[1:])
        drawn = weights[self._positive_user]
        won = drawn @ (total[self._below] + total[self._up_to]) / 2
        pairs = drawn.sum() * total[-1]
        count = self._group_count * weights[self._group_user]
        return (
            won / pairs if pairs else np.nan,
            count @ self._group_auc / count.sum() if count.any() else np.nan,
        )


def resampled_metrics(
    predictions: Sequence[Predictions], *, resamples: int = 1000, seed: int = 0
) -> np.ndarray:
    """AUC and GAUC of every set of predictions on the same resamples of users.

    Args:
        predictions: P sets over the same candidates.
        resamples: R.
        seed: of the draws.

    Returns:
        float64 [R + 1, P, 2], AUC and GAUC; the first entry is of the users as they are.

    Raises:
        ValueError: two sets score different candidates.
    """
    if not all(predictions[0].same_candidates(other) for other in predictions):
        raise ValueError("the predictions are not of the same candidates")
    ids, user = np.unique(predictions[0].user, return_inverse=True)
    sets = [WeightedMetrics(each, user) for each in predictions]
    random = np.random.default_rng(seed)
    values = np.empty((resamples + 1, len(sets), len(METRICS)))
    weights = np.ones(len(ids))
    for number in range(resamples + 1):
        values[number] = [each.under(weights) for each in sets]
        drawn = random.integers(len(ids), size=len(ids))
        weights = np.bincount(drawn, minlength=len(ids)).astype(np.float64)
    return values


def interval(values: np.ndarray) -> Interval:
    """The first of `values` [R + 1], and the middle 95% of the others."""
    low, high = np.nanquantile(values[1:], [0.025, 0.975])
    return Interval(float(values[0]), float(low), float(high))
