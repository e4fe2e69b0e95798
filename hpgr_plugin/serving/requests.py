"""Requests in the log's own ids, and the batch that the model takes.

A request has the user's history, or names one that the scorer keeps by its version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hpgr_plugin.data.batch import Batch, tensor
from hpgr_plugin.data.log import offsets_of
from hpgr_plugin.data.requests import RequestSettings
from hpgr_plugin.serving.vocabulary import UNKNOWN, RequestError, Vocabulary

_NO_BOUND = 2**62
_LATEST = 2**52


class HistoryNotKeptError(RequestError):
    """The history that a request names is not kept, or not any more: it has to be sent."""

    def __init__(self, reason: str) -> None:
        super().__init__("history_version", f"{reason}; send the history")


@dataclass(frozen=True, kw_only=True)
class Request:
    """Candidates to score, and one user's history or the version of a kept one.

    Attributes:
        candidates: item ids.
        times: seconds, when the candidates are shown: one for all, or one each. History at or
            after a candidate's time is hidden from it.
        history_items: ids, oldest first.
        history_times: seconds, ascending.
        history_actions: what the user did with each item, as the log codes it; needed where the
            model was trained with actions.
        history_version: of an earlier answer, in place of the history; it takes one time for all
            candidates, after the last event that was read.
        user_id: finds the user's kept history and, for a user of the log, the user's features.
        user_features: values by name, in place of those in the log.
    """

    candidates: Sequence[int | str]
    times: int | Sequence[int]
    history_items: Sequence[int | str] | None = None
    history_times: Sequence[int] | None = None
    history_actions: Sequence[Any] | None = None
    history_version: str | None = None
    user_id: int | str | None = None
    user_features: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EncodedCandidates:
    """Candidates in codes, and what finds the kept history that they are scored over.

    Attributes:
        candidates: int64 [2, C'], items and times of the known candidates.
        known: bool [C], which candidates the log has.
        user_features: codes by name.
        user: key of the kept history.
        version: digest of the history; the same history has the same.
    """

    candidates: np.ndarray
    known: np.ndarray
    user_features: dict[str, int]
    user: tuple[str, int | str]
    version: str


@dataclass(frozen=True, kw_only=True)
class EncodedRequest(EncodedCandidates):
    """A request in codes, cut to what the model reads.

    Attributes:
        history: int64 [3, N], items, times and actions.
        unknown_history: items of the history that the log does not have; they are left out.
    """

    history: np.ndarray
    unknown_history: int

    @property
    def one_time(self) -> bool:
        """Whether all known candidates are shown at one time, after the whole history."""
        times = self.candidates[1]
        if not len(times) or times.min() < times.max():
            return False
        return not self.history.shape[1] or bool(self.history[1, -1] < times[0])

    @property
    def fewest_visible(self) -> int:
        """How many items of the history every known candidate may see."""
        return int(np.searchsorted(self.history[1], self.candidates[1].min()))

    def split(self) -> Iterator[EncodedRequest]:
        """The same with one candidate each, for models that number a history by its candidate."""
        for place in range(self.candidates.shape[1]):
            one = self.candidates[:, place : place + 1]
            yield replace(self, candidates=one, known=np.ones(1, bool))


def encode(
    request: Request,
    vocabulary: Vocabulary,
    settings: RequestSettings,
    *,
    use_actions: bool,
    hide_future: bool = True,
) -> EncodedCandidates:
    """Check a request and code it, as requests of the training are cut.

    An `EncodedRequest`, or without its history where the request names one.

    Args:
        request: in the log's ids.
        vocabulary: of the log.
        settings: of the training's requests: the longest history, and from where it counts.
        use_actions: whether the model reads actions.
        hide_future: whether the model hides from a candidate what is not before it.

    Raises:
        RequestError: naming the field.
    """
    if request.history_version is not None:
        return _encode_named(request, vocabulary)
    if request.history_items is None or request.history_times is None:
        name = "items" if request.history_items is None else "times"
        raise RequestError(
            f"history.{name}", "is missing: give the history, or the history_version of a kept one"
        )
    items = vocabulary.items(request.history_items, "history.items")
    times = history_times(request.history_times, len(items))
    actions = np.zeros(len(items), np.int64)
    if request.history_actions is not None:
        check_length(request.history_actions, "history.actions", len(items))
        actions = vocabulary.actions(request.history_actions, "history.actions")
    elif use_actions and len(items):
        raise RequestError("history.actions", "is missing: the model was trained with actions")
    candidates = vocabulary.items(request.candidates, "candidates")
    shown_at = _shown_at(request)
    if not hide_future and len(shown_at) and shown_at.min() < shown_at.max():
        raise RequestError("times", "takes one time for all candidates: hide_future is False")
    known = candidates != UNKNOWN
    history = np.stack([items, times, actions])[:, _kept(items, times, shown_at, settings)]
    digest = hashlib.blake2b(np.ascontiguousarray(history).tobytes(), digest_size=12).hexdigest()
    return EncodedRequest(
        history=history,
        candidates=np.stack([candidates, shown_at])[:, known],
        known=known,
        user_features=vocabulary.user_feature_codes(request.user_id, dict(request.user_features)),
        unknown_history=int((items == UNKNOWN).sum()),
        user=_key(request, digest),
        version=digest,
    )


def _encode_named(request: Request, vocabulary: Vocabulary) -> EncodedCandidates:
    """Code a request that names its history: nothing here depends on the history's length."""
    version = request.history_version
    if not isinstance(version, str):
        raise RequestError("history_version", f"takes that of an answer, got {version!r}")
    parts = request.history_items, request.history_times, request.history_actions
    if any(part is not None for part in parts):
        raise RequestError("history_version", "give either it or the history, not both")
    candidates = vocabulary.items(request.candidates, "candidates")
    shown_at = _shown_at(request)
    if len(shown_at) and shown_at.min() < shown_at.max():
        raise RequestError(
            "times", "takes one time for all candidates where history_version names the history"
        )
    known = candidates != UNKNOWN
    return EncodedCandidates(
        candidates=np.stack([candidates, shown_at])[:, known],
        known=known,
        user_features=vocabulary.user_feature_codes(request.user_id, dict(request.user_features)),
        user=_key(request, version),
        version=version,
    )


def _key(request: Request, version: str) -> tuple[str, int | str]:
    """By which a history is kept."""
    return ("history", version) if request.user_id is None else ("user", request.user_id)


def _shown_at(request: Request) -> np.ndarray:
    """int64 seconds `[C]` at which the candidates are shown."""
    shown, count = request.times, len(request.candidates)
    if isinstance(shown, int) and not isinstance(shown, bool):
        return _times([shown], "times", 1).repeat(count)
    return _times(shown, "times", count)  # type: ignore[arg-type]


def batch_of(requests: Sequence[EncodedRequest]) -> Batch:
    """The model's batch, requests in their order."""
    history = np.concatenate([r.history for r in requests], 1)
    candidates = np.concatenate([r.candidates for r in requests], 1)
    names = requests[0].user_features
    return Batch(
        history_items=tensor(history[0]),
        history_timestamps=tensor(history[1]),
        history_actions=tensor(history[2]),
        history_offsets=tensor(offsets_of(np.array([r.history.shape[1] for r in requests]))),
        candidate_items=tensor(candidates[0]),
        candidate_timestamps=tensor(candidates[1]),
        candidate_labels=tensor(np.zeros(candidates.shape[1]), np.float32),
        candidate_offsets=tensor(offsets_of(np.array([r.candidates.shape[1] for r in requests]))),
        users=tensor(np.arange(len(requests))),
        user_features={
            name: tensor(np.array([r.user_features[name] for r in requests])) for name in names
        },
    )


def history_times(values: Sequence[Any], length: int) -> np.ndarray:
    """The times of a history of `length` items, int64 seconds.

    Raises:
        RequestError: they are no times, not one for each item, or not ascending.
    """
    times = _times(values, "history.times", length)
    descents = np.flatnonzero(np.diff(times) < 0)
    if len(descents):
        place = int(descents[0]) + 1
        raise RequestError(f"history.times[{place}]", "is before the one in front of it")
    return times


def _kept(
    items: np.ndarray, times: np.ndarray, shown_at: np.ndarray, settings: RequestSettings
) -> np.ndarray:
    """Places of the history that the model reads: known, before the candidates, the most recent."""
    bound = _NO_BOUND
    if len(shown_at):
        bound = int(shown_at.min() if settings.history == "request" else shown_at.max())
    places = np.flatnonzero((items != UNKNOWN) & (times < bound))
    return places[-settings.max_history :]


def _times(values: Sequence[Any], name: str, length: int) -> np.ndarray:
    """int64 seconds."""
    check_length(values, name, length)
    if set(map(type, values)) <= {int}:
        with suppress(OverflowError):
            times = np.asarray(values, dtype=np.int64)
            if not len(times) or (times.min() >= 0 and times.max() < _LATEST):
                return times
    for place, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise RequestError(f"{name}[{place}]", f"takes whole seconds, got {value!r}")
        if not 0 <= value < _LATEST:
            raise RequestError(f"{name}[{place}]", f"takes seconds from 0 to 2^52, got {value}")
    return np.asarray(values, dtype=np.int64)


def check_length(values: Sequence[Any], name: str, length: int) -> None:
    """One value for each of `length` items.

    Raises:
        RequestError: more or fewer.
    """
    if len(values) != length:
        raise RequestError(name, f"takes one for each of the {length} items, got {len(values)}")
