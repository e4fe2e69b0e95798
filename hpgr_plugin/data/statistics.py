"""Counts and likes of items and users before each event: features that a server would have too.

Leak-free by two rules. Only candidates of the training split count, so no label of validation or
test enters any feature, not even that of a later test candidate. And only those strictly before
the event in time count, so an event's own label, and labels of its second, stay out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hpgr_plugin.data.log import TRAIN, PreparedData


class CandidateStatistics(NamedTuple):
    """What the training events strictly before an event say about its item and its user.

    Attributes:
        item_count, item_likes: int32 [E], events of the item and how many of them were positive.
        user_count, user_likes: int32 [E], the same of the user.
    """

    item_count: np.ndarray
    item_likes: np.ndarray
    user_count: np.ndarray
    user_likes: np.ndarray


def candidate_statistics(prepared: PreparedData) -> CandidateStatistics:
    """The statistics of every event of the log, by two sorts and running totals."""
    log = prepared.log
    counted = np.flatnonzero(prepared.is_candidate & (prepared.split == TRAIN))
    times = log.timestamp - (log.timestamp.min() if log.num_events else 0)
    item = _before(log.item, times, log.label, counted)
    user = _before(log.event_users(), times, log.label, counted)
    return CandidateStatistics(*item, *user)


def _before(
    owner: np.ndarray, times: np.ndarray, labels: np.ndarray, counted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Counted events of the same owner strictly before each event, and their positives: int32 [E].

    Args:
        owner: [E] the item or user of every event.
        times: int64 [E], 0 or more.
        labels: int8 [E], 0 or 1.
        counted: rows of the events that count.
    """
    width = int(times.max(initial=0)) + 1
    key = owner.astype(np.int64) * width + times
    order = counted[np.argsort(key[counted], kind="stable")]
    likes = np.concatenate([[0], np.cumsum(labels[order], dtype=np.int64)])
    sorted_keys = key[order]
    start = np.searchsorted(sorted_keys, owner.astype(np.int64) * width)
    end = np.searchsorted(sorted_keys, key)  # left: an event of the same second stays out
    return (end - start).astype(np.int32), (likes[end] - likes[start]).astype(np.int32)
