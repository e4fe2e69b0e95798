"""Which events are for training, for validation and for test.

Every rule cuts each user's events (or all time) in the order train, validation, test. An event
that is only history takes the split of the user's next candidate (of the last one after it).
A cut may fall between two events of one second: their places stay as the log has them, and
the history rule, strictly before in time, keeps them from seeing each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hpgr_plugin.data.events import require
from hpgr_plugin.data.log import InteractionLog, offsets_of
from hpgr_plugin.errors import HpgrError


class Split(Protocol):
    """A rule for splitting; a frozen dataclass, so that its settings are part of the cache key."""

    def assign(self, log: InteractionLog, is_candidate: np.ndarray) -> np.ndarray:
        """int8 [E]: TRAIN, VALIDATION or TEST."""
        ...


@dataclass(frozen=True, kw_only=True)
class GlobalTimeSplit:
    """The last `test` of all candidates in time, and `validation` before it.

    Candidates of the second at a cut all fall on its later side, so a split can be a little
    larger than its fraction.
    """

    test: float = 0.1
    validation: float = 0.1

    def __post_init__(self) -> None:
        _check_fractions(self)

    def assign(self, log: InteractionLog, is_candidate: np.ndarray) -> np.ndarray:
        """Depends only on the time of the event."""
        times = np.sort(log.timestamp[is_candidate])
        code = np.zeros(log.num_events, dtype=np.int8)
        for fraction in (self.test + self.validation, self.test):
            start = len(times) - round(fraction * len(times))
            if start < len(times):
                code += log.timestamp >= times[start]
        return code


@dataclass(frozen=True, kw_only=True)
class LastFractionSplit:
    """The last `test` of each user's candidates, and `validation` before it, both rounded."""

    test: float = 0.1
    validation: float = 0.1

    def __post_init__(self) -> None:
        _check_fractions(self)

    def assign(self, log: InteractionLog, is_candidate: np.ndarray) -> np.ndarray:
        """By the place among the user's candidates."""
        _, counts = _places(log, is_candidate)
        num_test = np.floor(counts * self.test + 0.5).astype(np.int64)
        num_validation = np.floor(counts * self.validation + 0.5).astype(np.int64)
        return _assign_last(log, is_candidate, num_test, num_validation)


@dataclass(frozen=True, kw_only=True)
class LastNSplit:
    """The last `test` candidates of each user, and `validation` candidates before them."""

    test: int = 1
    validation: int = 1

    def __post_init__(self) -> None:
        for name in ("test", "validation"):
            count = getattr(self, name)
            require(count >= 0, f"LastNSplit.{name}", "counts of events, 0 or more", count)

    def assign(self, log: InteractionLog, is_candidate: np.ndarray) -> np.ndarray:
        """By the place among the user's candidates."""
        shape = log.num_users
        return _assign_last(
            log, is_candidate, np.full(shape, self.test), np.full(shape, self.validation)
        )


def _assign_last(
    log: InteractionLog,
    is_candidate: np.ndarray,
    num_test: np.ndarray,
    num_validation: np.ndarray,
) -> np.ndarray:
    place, counts = _places(log, is_candidate)
    lengths = np.diff(log.user_offsets)
    place = np.minimum(place, np.repeat(np.maximum(counts - 1, 0), lengths))
    code = np.zeros(log.num_events, dtype=np.int8)
    has_candidates = counts > 0
    for cut in (counts - num_test, counts - num_test - num_validation):
        code += place >= np.repeat(np.where(has_candidates, cut, 1), lengths)
    return code if log.group is None else _whole_groups(log, log.group, is_candidate, code)


def _whole_groups(
    log: InteractionLog, group: np.ndarray, is_candidate: np.ndarray, code: np.ndarray
) -> np.ndarray:
    """Candidates shown together take the split of the first of them.

    Exactly one of an impression is clicked, so its labels give each other away.
    """
    rows = np.flatnonzero(is_candidate)
    users = log.event_users()[rows]
    starts = np.ones(len(rows), dtype=bool)
    starts[1:] = (group[rows[1:]] != group[rows[:-1]]) | (users[1:] != users[:-1])
    first = np.flatnonzero(starts)[np.cumsum(starts) - 1]
    code[rows] = code[rows[first]]
    return code


def _places(log: InteractionLog, is_candidate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Candidates of the user before each event [E], and candidates of each user [U]."""
    before = offsets_of(is_candidate)
    first = before[log.user_offsets[:-1]]
    counts = before[log.user_offsets[1:]] - first
    return before[:-1] - np.repeat(first, np.diff(log.user_offsets)), counts


def _check_fractions(split: GlobalTimeSplit | LastFractionSplit) -> None:
    test, validation, name = split.test, split.validation, type(split).__name__
    require(test >= 0, f"{name}.test", "a fraction of 0 or more", test)
    require(validation >= 0, f"{name}.validation", "a fraction of 0 or more", validation)
    if not test + validation < 1:
        problem = "test and validation take fractions that leave some for training"
        raise HpgrError(f"hpgr.{name}: {problem}, got {test} and {validation}")
