"""The interaction log: every event of every user, once, in flat arrays."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class CategoricalFeature:
    """One categorical side feature of every user or every item.

    Attributes:
        codes: int32 [num_users] or [num_items]; 0 means unknown.
        num_values: codes are 0..num_values-1.
    """

    codes: np.ndarray
    num_values: int


@dataclass(frozen=True)
class InteractionLog:
    """E events sorted by (user, timestamp, order in the source).

    Attributes:
        user_offsets: int64 [U + 1]; user u owns events user_offsets[u]:user_offsets[u + 1].
        item: int32 [E], 0..num_items-1. There is no padding item.
        timestamp: int64 [E] seconds.
        action: int16 [E], 0..num_actions-1: what the user did, as the source codes it.
        label: int8 [E], 0 or 1.
        item_ids: [V] the source's item ids; code v stands for item_ids[v].
        user_ids: [U] the source's user ids.
        num_actions: number of distinct actions.
        item_vocabulary_digest: sha256 over item_ids in order: equal codes mean equal items.
        group: int64 [E] or None: events shown together (an impression) share a value.
        user_features, item_features: by name.
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
    user_features: dict[str, CategoricalFeature] = field(default_factory=dict)
    item_features: dict[str, CategoricalFeature] = field(default_factory=dict)

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


def vocabulary_digest(ids: np.ndarray) -> str:
    """sha256 over the ids in order, as text: int32 and int64 ids of one value agree."""
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
