"""Events as read -> the coded, sorted log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hpgr_plugin.data.events import DataError, EventTable, SideTable
from hpgr_plugin.data.log import (
    CategoricalFeature,
    InteractionLog,
    offsets_of,
    sessions_per_user,
    vocabulary_digest,
)


class BuiltLog(NamedTuple):
    """The log, and which of its events may be candidates: bool [E]."""

    log: InteractionLog
    is_candidate: np.ndarray


def build_log(
    events: EventTable,
    *,
    label: np.ndarray,
    action: np.ndarray,
    task_labels: Mapping[str, np.ndarray] | None = None,
    min_user_events: int = 1,
    min_item_events: int = 1,
    min_user_sessions: int = 1,
    session_gap_seconds: int = 1800,
) -> BuiltLog:
    """Codes users, items and actions, applies the minimum counts and sorts.

    The counts are taken once, for users and items together, and not repeated: a user may end
    below the minimum because some of its items were dropped.

    Args:
        events: what a reader returned.
        label: int8 [E], 0 or 1.
        action: [E] values; they are coded 0.. in ascending order.
        task_labels: int8 [E], 0 or 1, of further tasks by name.
        min_user_events: drop users with fewer events.
        min_item_events: drop items with fewer events.
        min_user_sessions: drop users with fewer sessions.
        session_gap_seconds: a session ends where more than this many seconds pass.

    Raises:
        DataError: nothing is left.
    """
    user, user_ids = _code(events.user)
    item, item_ids = _code(events.item)
    keep = np.bincount(user)[user] >= min_user_events
    keep &= np.bincount(item)[item] >= min_item_events
    order = _sorted_rows(user, events.timestamp, np.flatnonzero(keep))
    if min_user_sessions > 1:
        offsets = offsets_of(np.bincount(user[order], minlength=len(user_ids)))
        counts = sessions_per_user(offsets, events.timestamp[order], session_gap_seconds)
        order = order[counts[user[order]] >= min_user_sessions]
    if not len(order):
        raise DataError("no event is left after dropping bad rows and the minimum counts")

    user, user_ids = _compact(user[order], user_ids)
    item, item_ids = _compact(item[order], item_ids)
    kinds, action_codes = np.unique(action[order], return_inverse=True)
    log = InteractionLog(
        user_offsets=offsets_of(np.bincount(user, minlength=len(user_ids))),
        item=item.astype(np.int32),
        timestamp=events.timestamp[order],
        action=action_codes.astype(np.int16 if len(kinds) <= 2**15 else np.int32),
        label=label[order],
        item_ids=item_ids,
        user_ids=user_ids,
        num_actions=len(kinds),
        action_values=kinds.astype(np.str_) if kinds.dtype == object else kinds,
        item_vocabulary_digest=vocabulary_digest(item_ids),
        group=None if events.group is None else events.group[order],
        user_features=_coded_features(events.user_features, user_ids),
        item_features=_coded_features(events.item_features, item_ids),
        task_labels={name: values[order] for name, values in (task_labels or {}).items()},
    )
    candidate = events.candidate
    return BuiltLog(log, np.ones(len(order), bool) if candidate is None else candidate[order])


def _code(ids: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Codes int32 [E] in the order of the sorted distinct ids [N]."""
    encoded = ids.dictionary_encode()
    rank = pc.sort_indices(encoded.dictionary).to_numpy()
    place = np.empty(len(rank), dtype=np.int32)
    place[rank] = np.arange(len(rank), dtype=np.int32)
    distinct = encoded.dictionary.take(pa.array(rank))
    if pa.types.is_integer(distinct.type):
        sorted_ids = distinct.to_numpy()
    else:  # fixed-width text: unlike objects it can be memory-mapped
        sorted_ids = np.array(distinct.to_pylist(), dtype=np.str_)
    return place[encoded.indices.to_numpy()], sorted_ids


def _sorted_rows(user: np.ndarray, timestamp: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The rows by (user, timestamp, original order)."""
    if not len(rows):
        return rows
    times = timestamp[rows]
    times -= times.min()
    key = user[rows].astype(np.int64) * (int(times.max()) + 1) + times
    return rows[np.argsort(key, kind="stable")]


def _compact(codes: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and ids without the ids that no event uses any more."""
    used = np.bincount(codes, minlength=len(ids)) > 0
    return (np.cumsum(used) - 1)[codes], ids[used]


def _coded_features(side: SideTable | None, ids: np.ndarray) -> dict[str, CategoricalFeature]:
    """Codes by name for these ids; 0 where the table or the value is missing."""
    if side is None:
        return {}
    rows = pc.index_in(
        pa.array(ids.tolist()).cast(pa.string()), value_set=side.ids.cast(pa.string())
    )
    features = {}
    for name, column in side.columns.items():
        values = column.take(rows)
        distinct = pc.unique(values).drop_null()
        distinct = distinct.take(pc.sort_indices(distinct))
        codes = pc.fill_null(pc.add(pc.index_in(values, value_set=distinct), 1), 0)
        codes = pc.if_else(pc.is_null(values), 0, codes)
        features[name] = CategoricalFeature(
            codes.to_numpy().astype(np.int32),
            len(distinct) + 1,
            np.array([str(value) for value in distinct.to_pylist()], dtype=np.str_),
        )
    return features
