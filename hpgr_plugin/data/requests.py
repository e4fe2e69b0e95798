"""Requests: runs of one user's candidates, each with the history they share.

A request is four indices into the flat log; nothing is copied until a batch is gathered.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np

from hpgr_plugin.data.events import require
from hpgr_plugin.data.log import SPLITS, TRAIN, PreparedData, concatenated_ranges


@dataclass(frozen=True, kw_only=True)
class RequestSettings:
    """How candidates are grouped into requests.

    Args:
        max_history: at most this many history events are kept, the most recent.
        max_candidates: at most this many candidates per request.
        request_span_seconds: a request ends before the first candidate later than this many
            seconds after its first one. None: no such end.
        history: "candidate": events strictly before the last candidate's time, so the host
            hides t_i >= t_C for each candidate, and earlier candidates of the request are
            history of later ones. "request": events strictly before the first candidate's time.
            With either, max_history counts back from there, once per request.
        min_history: training requests with a shorter history are left out.
        min_history_in_evaluation: the same for validation and test.
        max_train_candidates_per_user: at most this many are trained on, the most recent. None: all.
        train_fraction: train on this fraction of the requests, drawn by `seed`.
        seed: of that draw.
    """

    max_history: int = 400
    max_candidates: int = 16
    request_span_seconds: int | None = None
    history: Literal["candidate", "request"] = "candidate"
    min_history: int = 1
    min_history_in_evaluation: int = 0
    max_train_candidates_per_user: int | None = None
    train_fraction: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        span, limit = self.request_span_seconds, self.max_train_candidates_per_user
        for name, fits, takes in (
            ("history", self.history in ("candidate", "request"), "'candidate' or 'request'"),
            ("max_history", self.max_history >= 1, "1 or more"),
            ("min_history", self.min_history >= 0, "0 or more"),
            ("min_history_in_evaluation", self.min_history_in_evaluation >= 0, "0 or more"),
            ("max_candidates", self.max_candidates >= 1, "1 or more"),
            ("request_span_seconds", span is None or span >= 0, "None or 0 or more"),
            ("max_train_candidates_per_user", limit is None or limit >= 1, "None or 1 or more"),
            ("train_fraction", 0 < self.train_fraction <= 1, "a fraction above 0 and up to 1"),
            ("seed", self.seed >= 0, "0 or more"),
        ):
            require(fits, f"RequestSettings.{name}", takes, getattr(self, name))


@dataclass(frozen=True)
class Requests:
    """R requests of one split, in the order of the log.

    Attributes:
        candidate_rows: int64 [N] rows of the log that are candidates of the split.
        users: int32 [R].
        candidate_start: int64 [R] into candidate_rows.
        candidate_count: int64 [R], at least 1.
        history_start: int64 [R] into PreparedData.history_rows.
        history_count: int64 [R], 0 to max_history.
    """

    candidate_rows: np.ndarray
    users: np.ndarray
    candidate_start: np.ndarray
    candidate_count: np.ndarray
    history_start: np.ndarray
    history_count: np.ndarray

    def __len__(self) -> int:
        return len(self.users)

    def take(self, which: np.ndarray) -> Requests:
        """The requests at these places, or under this mask."""
        names = [f.name for f in fields(self) if f.name != "candidate_rows"]
        return replace(self, **{name: getattr(self, name)[which] for name in names})

    def all_candidate_rows(self) -> np.ndarray:
        """The rows of the log that these requests rank, in order."""
        return self.candidate_rows[concatenated_ranges(self.candidate_start, self.candidate_count)]


def build_requests(prepared: PreparedData, split: str, settings: RequestSettings) -> Requests:
    """All requests of a split.

    Args:
        prepared: the data.
        split: "train", "validation" or "test".
        settings: how candidates are grouped.
    """
    if split not in SPLITS:
        raise ValueError(f"split is one of {', '.join(SPLITS)}, got {split!r}")
    code = SPLITS.index(split)
    rows = np.flatnonzero(prepared.is_candidate & (prepared.split == code))
    users = np.searchsorted(prepared.log.user_offsets, rows, side="right") - 1
    if code == TRAIN and settings.max_train_candidates_per_user is not None:
        recent = _most_recent(users, settings.max_train_candidates_per_user)
        rows, users = rows[recent], users[recent]

    start = _request_starts(prepared, rows, users, settings)
    count = np.diff(start, append=len(rows))
    owner = users[start]
    bound = start if settings.history == "request" else start + count - 1
    history_start, history_count = _histories(
        prepared, owner, prepared.log.timestamp[rows[bound]], settings.max_history
    )
    requests = Requests(rows, owner.astype(np.int32), start, count, history_start, history_count)
    least = settings.min_history if code == TRAIN else settings.min_history_in_evaluation
    requests = requests.take(history_count >= least)
    if code == TRAIN and settings.train_fraction < 1:
        random = np.random.default_rng([settings.seed, 1])
        requests = requests.take(random.random(len(requests)) < settings.train_fraction)
    return requests


def _most_recent(users: np.ndarray, limit: int) -> np.ndarray:
    """True for the last `limit` of each user's rows."""
    last = np.searchsorted(users, users, side="right")
    return last - np.arange(len(users)) <= limit


def _request_starts(
    prepared: PreparedData, rows: np.ndarray, users: np.ndarray, settings: RequestSettings
) -> np.ndarray:
    """Where each request starts in `rows`, ascending."""
    if not len(rows):
        return np.zeros(0, dtype=np.int64)
    new_block = np.ones(len(rows), dtype=bool)
    new_block[1:] = users[1:] != users[:-1]
    if prepared.log.group is not None:
        group = prepared.log.group[rows]
        new_block[1:] |= group[1:] != group[:-1]
    block_start = np.flatnonzero(new_block)
    block = np.cumsum(new_block) - 1
    block_end = np.append(block_start[1:], len(rows))

    following = np.minimum(np.arange(len(rows)) + settings.max_candidates, block_end[block])
    if settings.request_span_seconds is not None:
        times = prepared.log.timestamp[rows]
        times = times - times.min()
        span = min(settings.request_span_seconds, int(times.max()))
        # One ascending key over all blocks: the next block is always out of reach.
        key = block * (int(times.max()) + span + 1) + times
        following = np.minimum(following, np.searchsorted(key, key + span, side="right"))

    # Every block walks from request to request, all blocks at once.
    starts, current, end = [], block_start, block_end
    while len(current):
        starts.append(current)
        current = following[current]
        inside = current < end
        current, end = current[inside], end[inside]
    return np.sort(np.concatenate(starts))


def _histories(
    prepared: PreparedData, users: np.ndarray, bounds: np.ndarray, max_history: int
) -> tuple[np.ndarray, np.ndarray]:
    """Start and count, in history_rows, of each user's events strictly before the bound."""
    log, offsets = prepared.log, prepared.history_offsets
    owner = np.repeat(np.arange(log.num_users), np.diff(offsets))
    times = log.timestamp[prepared.history_rows]
    low = int(log.timestamp.min())
    width = int(log.timestamp.max()) - low + 1
    end = np.searchsorted(owner * width + (times - low), users * width + (bounds - low))
    start = np.maximum(offsets[users], end - max_history)
    return start, end - start
