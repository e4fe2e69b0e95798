"""Baselines that need no model."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
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
        tasks: the same of further tasks, by name.
    """

    labels: np.ndarray
    scores: np.ndarray
    users: np.ndarray
    rows: np.ndarray
    tasks: Mapping[str, Scored] = MappingProxyType({})


def item_mean_scores(
    prepared: PreparedData,
    split: str,
    settings: RequestSettings,
    *,
    prior_events: float = 20.0,
) -> Scored:
    """The mean training label of each item, shrunk towards the overall mean; of every task.

    Args:
        prepared: the data.
        split: whose requests are scored.
        settings: of the requests.
        prior_events: weight of the overall mean, in events.
    """
    log = prepared.log
    train = prepared.is_candidate & (prepared.split == TRAIN)
    item = log.item[train]
    total = np.bincount(item, minlength=log.num_items)
    requests = build_requests(prepared, split, settings)
    rows = requests.all_candidate_rows()
    users = np.repeat(requests.users, requests.candidate_count)

    def scored(labels: np.ndarray, tasks: Mapping[str, Scored]) -> Scored:
        mean = float(labels[train].mean())
        positive = np.bincount(item, weights=labels[train], minlength=log.num_items)
        item_mean = (positive + prior_events * mean) / (total + prior_events)
        return Scored(labels[rows], item_mean[log.item[rows]], users, rows, tasks)

    tasks = {name: scored(labels, {}) for name, labels in log.task_labels.items()}
    return scored(log.label, tasks)
