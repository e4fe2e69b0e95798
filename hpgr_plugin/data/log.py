"""The interaction log: every event of every user in flat arrays, and its split."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from hpgr_plugin.data.statistics import CandidateStatistics

SPLITS = ("train", "validation", "test")
TRAIN, VALIDATION, TEST = 0, 1, 2


@dataclass(frozen=True)
class CategoricalFeature:
    """One categorical side feature of every user or every item.

    Attributes:
        codes: int32 [num_users] or [num_items]; 0 means unknown.
        num_values: codes are 0..num_values-1.
        values: the source's value of code 1, 2 and so on, as text; None: not known.
    """

    codes: np.ndarray
    num_values: int
    values: np.ndarray | None = None


@dataclass(frozen=True)
class InteractionLog:
    """E events sorted by (user, timestamp, order in the source).

    Attributes:
        user_offsets: int64 [U + 1]; user u owns events user_offsets[u]:user_offsets[u + 1].
        item: int32 [E], 0..num_items-1. There is no padding item.
        timestamp: int64 [E] seconds.
        action: int16 [E] (int32 where there are more than 32,768), 0..num_actions-1: what the
            user did, as the source codes it.
        label: int8 [E], 0 or 1.
        item_ids: [V] the source's item ids, by code.
        user_ids: [U] the source's user ids.
        num_actions: number of distinct actions.
        action_values: [num_actions] the source's value of every action; None: not known.
        item_vocabulary_digest: sha256 over item_ids in order: equal codes mean equal items.
        group: int64 [E] or None: events shown together (an impression) share a value.
        user_features, item_features: by name.
        task_labels: int8 [E], 0 or 1, by the names of further tasks; `label` is the main task's.
    """

    user_offsets: np.ndarray
    item: np.ndarray
    timestamp: np.ndarray
    action: np.ndarray
    label: np.ndarray
    item_ids: np.ndarray
    user_ids: np.ndarray
    num_actions: int
    item_vocabulary_digest: str
    group: np.ndarray | None = None
    action_values: np.ndarray | None = None
    user_features: dict[str, CategoricalFeature] = field(default_factory=dict)
    item_features: dict[str, CategoricalFeature] = field(default_factory=dict)
    task_labels: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def num_events(self) -> int:
        """E."""
        return len(self.item)

    @property
    def num_items(self) -> int:
        """V."""
        return len(self.item_ids)

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.user_ids)

    def event_users(self) -> np.ndarray:
        """The user of every event, int32 [E]."""
        return np.repeat(np.arange(self.num_users, dtype=np.int32), np.diff(self.user_offsets))


@dataclass(frozen=True)
class PreparedData:
    """The log, and what each event is used for.

    Attributes:
        log: every event.
        split: int8 [E], index into SPLITS.
        is_history: bool [E]; events that later requests of the user may see.
        is_candidate: bool [E]; events that are ranked.
        dropped: file name -> bad rows left out.
        settings: how it was made: reader, label rule, split rule and minimum counts.
    """

    log: InteractionLog
    split: np.ndarray
    is_history: np.ndarray
    is_candidate: np.ndarray
    dropped: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def history_rows(self) -> np.ndarray:
        """Rows of the log that are history, int64 [H]."""
        return np.flatnonzero(self.is_history)

    @cached_property
    def history_offsets(self) -> np.ndarray:
        """User u owns history_rows[history_offsets[u]:history_offsets[u + 1]]; int64 [U + 1]."""
        return offsets_of(self.is_history)[self.log.user_offsets]

    @cached_property
    def statistics(self) -> CandidateStatistics:
        """What the training events before each event say about its item and its user."""
        from hpgr_plugin.data.statistics import candidate_statistics

        return candidate_statistics(self)

    def digest(self) -> str:
        """CRC-32 of everything a training reads: equal digests mean equal data."""
        log, crc = self.log, 0
        features = [*log.user_features.values(), *log.item_features.values()]
        arrays = [log.user_offsets, log.item, log.timestamp, log.action, log.label, self.split]
        arrays += [self.is_history, self.is_candidate, *(feature.codes for feature in features)]
        arrays += log.task_labels.values()
        for array in arrays:
            crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
        for name in log.task_labels:
            crc = zlib.crc32(name.encode(), crc)
        return f"{zlib.crc32(log.item_vocabulary_digest.encode(), crc):08x}"

    def summary(self) -> str:
        """One line: users, items, events and how the candidates are split."""
        log = self.log
        counts = np.bincount(self.split[self.is_candidate], minlength=len(SPLITS))
        parts = ", ".join(f"{n:,} {name}" for n, name in zip(counts, SPLITS, strict=True))
        labels = {"positive": log.label, **log.task_labels}
        some = self.is_candidate.any()
        shares = ", ".join(
            f"{values[self.is_candidate].mean() if some else 0.0:.1%} {name}"
            for name, values in labels.items()
        )
        dropped = sum(self.dropped.values())
        return (
            f"{log.num_users:,} users, {log.num_items:,} items, {log.num_events:,} events; "
            f"candidates: {parts}; {shares}"
            + (f"; {dropped:,} bad rows dropped" if dropped else "")
        )


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Offsets int64 [R + 1] of segments with these lengths [R]."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def concatenated_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[0], starts[0]+1, ... (lengths[0] numbers), then the next: int64 [sum(lengths)]."""
    offsets = offsets_of(lengths)
    return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)


def vocabulary_digest(ids: np.ndarray) -> str:
    """sha256 over the ids in order, as text, so that the integer type does not matter."""
    digest = hashlib.sha256()
    for identifier in ids.tolist():
        text = str(identifier).encode()
        digest.update(len(text).to_bytes(4, "little") + text)
    return digest.hexdigest()


def sessions_per_user(
    user_offsets: np.ndarray, timestamps: np.ndarray, gap_seconds: int
) -> np.ndarray:
    """Number of sessions of each user, int64 [U]: a new one starts after more than gap_seconds."""
    starts = np.ones(len(timestamps), dtype=np.int64)
    starts[1:] = np.diff(timestamps) > gap_seconds
    first = user_offsets[:-1][np.diff(user_offsets) > 0]
    starts[first] = 1
    total = np.concatenate([[0], np.cumsum(starts)])
    return total[user_offsets[1:]] - total[user_offsets[:-1]]
