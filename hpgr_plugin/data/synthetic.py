"""A log whose right answers are known: planted sessions and planted preferences.

Items fall into clusters, and every user likes some of them. The oldest part of a history shows
the taste: events on tasting clusters, positive where the user likes the cluster. Then follow
distractors, from clusters that no candidate comes from. The candidates come last, from tasting
clusters: predicting their labels takes the old events of the candidate's cluster, behind many
recent distractors. Sessions are separated by a longer gap than any inside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from hpgr_plugin.data.events import (
    DataError,
    EventTable,
    SideTable,
    require,
    require_fields,
)


@dataclass(frozen=True)
class SyntheticTruth:
    """What was planted; E events in the order of the log (users ascending, then time).

    Attributes:
        item_cluster: int64 [num_items] by item id.
        likes: bool [num_users, num_clusters] by user id.
        event_item: int64 [E] item id of each event.
        event_user: int64 [E] user id of each event.
        session_start: bool [E].
        tells: bool [E]; events of the oldest part, which show the taste.
    """

    item_cluster: np.ndarray
    likes: np.ndarray
    event_item: np.ndarray
    event_user: np.ndarray
    session_start: np.ndarray
    tells: np.ndarray

    def relevant_rows(self, event: int) -> np.ndarray:
        """The earlier events of the user that settle the label of this candidate event."""
        same_user = self.event_user == self.event_user[event]
        cluster = self.item_cluster[self.event_item]
        return np.flatnonzero(same_user & self.tells & (cluster == cluster[event]))


@dataclass(frozen=True, kw_only=True)
class SyntheticReader:
    """Generates the log; the field for labels and actions is `is_click`.

    Args:
        num_users: users, ids 0..num_users-1.
        num_clusters: clusters of items; the first half are tasting clusters, the rest
            distractors.
        items_per_cluster: item id i lies in cluster i // items_per_cluster.
        liked_clusters: how many tasting clusters each user likes.
        tells_per_cluster: old events of each user on each tasting cluster.
        distractors: events of each user between the oldest part and the candidates; their
            label is random.
        candidates: candidate events of each user.
        session_length: events per session.
        session_gap_seconds: pause between sessions; more than the 60 s inside them.
        label_noise: probability that a candidate's label is flipped.
        seed: of everything.
        features: give every item its cluster as a feature.
    """

    num_users: int = 200
    num_clusters: int = 16
    items_per_cluster: int = 10
    liked_clusters: int = 4
    tells_per_cluster: int = 2
    distractors: int = 30
    candidates: int = 20
    session_length: int = 5
    session_gap_seconds: int = 7200
    label_noise: float = 0.0
    seed: int = 0
    features: bool = False

    def __post_init__(self) -> None:
        require_fields(self, 0, "distractors", "seed")
        require_fields(self, 1, "num_users", "items_per_cluster", "tells_per_cluster", "candidates")
        require_fields(self, 1, "session_length")
        require_fields(self, 61, "session_gap_seconds")
        fits = 0 <= self.label_noise <= 1
        require(fits, "SyntheticReader.label_noise", "a probability", self.label_noise)
        takes = f"1 to num_clusters // 2 - 1 = {self._tasting - 1}"
        fits = 0 < self.liked_clusters < self._tasting
        require(fits, "SyntheticReader.liked_clusters", takes, self.liked_clusters)

    def sources(self) -> list[Path]:
        """None: the settings are the source."""
        return []

    def read(self, fields: Sequence[str]) -> EventTable:
        """The events, users ascending, each in time."""
        for name in fields:
            if name != "is_click":
                raise DataError("the synthetic log has only the field 'is_click'", field=name)
        truth, label = self._make()
        place = np.tile(np.arange(self._events_per_user), self.num_users)
        cluster = pa.array([str(code) for code in truth.item_cluster])
        ids = pa.array(np.arange(len(truth.item_cluster)))
        return EventTable(
            item_features=SideTable(ids, {"cluster": cluster}) if self.features else None,
            user=pa.array(truth.event_user),
            item=pa.array(truth.event_item),
            timestamp=self._times()[place],
            values={"is_click": label.astype(np.float64)},
            candidate=place >= self._events_per_user - self.candidates,
        )

    def truth(self) -> SyntheticTruth:
        """What was planted."""
        return self._make()[0]

    @property
    def _tasting(self) -> int:
        return self.num_clusters // 2

    @property
    def _events_per_user(self) -> int:
        return self._tasting * self.tells_per_cluster + self.distractors + self.candidates

    def _times(self) -> np.ndarray:
        """int64 [events per user] seconds, the same for all users."""
        place = np.arange(self._events_per_user)
        session = place // self.session_length
        pause = self.session_gap_seconds - 60
        return 1_600_000_000 + 60 * place + pause * session

    def _make(self) -> tuple[SyntheticTruth, np.ndarray]:
        random = np.random.default_rng(self.seed)
        users, tasting = self.num_users, self._tasting
        likes = np.zeros((users, self.num_clusters), dtype=bool)
        liked = random.random((users, tasting)).argsort(axis=1)[:, : self.liked_clusters]
        np.put_along_axis(likes, liked, True, axis=1)

        old = np.tile(np.repeat(np.arange(tasting), self.tells_per_cluster), (users, 1))
        old = random.permuted(old, axis=1)
        noise = random.integers(tasting, self.num_clusters, (users, self.distractors))
        asked = random.integers(0, tasting, (users, self.candidates))
        cluster = np.concatenate([old, noise, asked], axis=1)

        label = np.take_along_axis(likes, cluster, axis=1)
        coins = slice(old.shape[1], old.shape[1] + self.distractors)
        label[:, coins] = random.random((users, self.distractors)) < 0.5
        label[:, coins.stop :] ^= random.random(asked.shape) < self.label_noise

        item = cluster * self.items_per_cluster
        item += random.integers(0, self.items_per_cluster, cluster.shape)
        place = np.tile(np.arange(self._events_per_user), (users, 1))
        truth = SyntheticTruth(
            item_cluster=np.arange(self.num_clusters * self.items_per_cluster)
            // self.items_per_cluster,
            likes=likes,
            event_item=item.ravel(),
            event_user=np.repeat(np.arange(users), self._events_per_user),
            session_start=(place % self.session_length == 0).ravel(),
            tells=(place < old.shape[1]).ravel(),
        )
        return truth, label.ravel()
