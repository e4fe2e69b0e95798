"""Baselines that need no model."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hpgr_plugin.data.log import TRAIN, PreparedData
from hpgr_plugin.data.requests import RequestSettings, build_requests


class Scored(NamedTuple):
    """Scored candidates of a split, in the order of its requests.

    Attributes:
        labels: int8 [C].
        scores: float64 [C], probabilities.
        users: int32 [C].
        rows: int64 [C], rows of the log.
    """

    labels: np.ndarray
    scores: np.ndarray
    users: np.ndarray
    rows: np.ndarray


def item_mean_scores(
    prepared: PreparedData,
    split: str,
    settings: RequestSettings,
    *,
    prior_events: float = 20.0,
) -> Scored:
    """The mean training label of each item, shrunk towards the overall mean.

    Args:
        prepared: the data.
        split: whose requests are scored.
        settings: of the requests.
        prior_events: weight of the overall mean, in events.
    """
    log = prepared.log
    train = prepared.is_candidate & (prepared.split == TRAIN)
    item, label = log.item[train], log.label[train]
    mean = float(label.mean())
    total = np.bincount(item, minlength=log.num_items)
    positive = np.bincount(item, weights=label, minlength=log.num_items)
    item_mean = (positive + prior_events * mean) / (total + prior_events)

    requests = build_requests(prepared, split, settings)
    rows = requests.all_candidate_rows()
    users = np.repeat(requests.users, requests.candidate_count)
    return Scored(log.label[rows], item_mean[log.item[rows]], users, rows)
