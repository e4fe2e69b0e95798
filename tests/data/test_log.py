"""The log: order, codes, minimum counts, features."""

import hashlib
import itertools

import numpy as np
import pyarrow as pa
import pytest

from hpgr_plugin.data.build import BuiltLog, build_log
from hpgr_plugin.data.events import DataError, EventTable, SideTable
from hpgr_plugin.data.log import sessions_per_user, vocabulary_digest


def build(rows: list[tuple], *, side: SideTable | None = None, **counts: int) -> BuiltLog:
    user, item, time, label = map(list, zip(*rows, strict=True))
    events = EventTable(
        user=pa.array(user),
        item=pa.array(item),
        timestamp=np.array(time),
        values={},
        item_features=side,
        candidate=np.arange(len(rows)) % 2 == 0,
    )
    return build_log(events, label=np.array(label, np.int8), action=np.array(label) * 5, **counts)


def test_events_are_sorted_by_user_time_and_source_order() -> None:
    random = np.random.default_rng(0)
    rows = [
        (int(u), int(i), int(t), int(label))
        for u, i, t, label in zip(
            random.integers(0, 5, 200) * 7,
            random.integers(0, 30, 200) * 3,
            random.integers(0, 20, 200) + 10**9,
            random.integers(0, 2, 200),
            strict=True,
        )
    ]
    log, is_candidate = build(rows)
    order = sorted(range(len(rows)), key=lambda row: (rows[row][0], rows[row][2], row))
    assert log.user_ids[log.event_users()].tolist() == [rows[row][0] for row in order]
    assert log.item_ids[log.item].tolist() == [rows[row][1] for row in order]
    assert log.timestamp.tolist() == [rows[row][2] for row in order]
    assert log.label.tolist() == [rows[row][3] for row in order]
    assert log.action.tolist() == [rows[row][3] for row in order]
    assert is_candidate.tolist() == [row % 2 == 0 for row in order]
    assert log.num_actions == 2
    assert (log.item.dtype, log.action.dtype, log.label.dtype) == (np.int32, np.int16, np.int8)


def test_many_users_over_a_long_time_do_not_overflow() -> None:
    rows = [(user, 0, time, 0) for user in range(3000) for time in (8 * 10**9, 1)]
    log, _ = build(rows)
    assert log.timestamp.tolist() == [1, 8 * 10**9] * 3000


def test_text_ids_and_codes_without_padding() -> None:
    log, _ = build([("b", "y", 1, 1), ("a", "x", 2, 0), ("b", "x", 0, 1)])
    assert log.user_ids.tolist() == ["a", "b"]
    assert log.item_ids.tolist() == ["x", "y"]
    assert log.item.tolist() == [0, 0, 1]
    assert log.user_offsets.tolist() == [0, 1, 3]


def test_minimum_counts_are_applied_once() -> None:
    rows = [
        (1, 10, 0, 1),
        (1, 11, 1, 1),
        (2, 10, 2, 1),
        (3, 10, 3, 1),
        (3, 12, 4, 1),
        (3, 12, 5, 1),
    ]
    log, _ = build(rows, min_user_events=2, min_item_events=2)
    # User 1 stays with one event: item 11 went, and the count is not taken again.
    assert log.user_ids.tolist() == [1, 3]
    assert log.item_ids.tolist() == [10, 12]
    assert log.user_offsets.tolist() == [0, 1, 4]


def test_minimum_sessions() -> None:
    rows = [(1, 0, 0, 1), (1, 0, 100, 1), (2, 0, 0, 1), (2, 0, 101, 1), (3, 0, 0, 1)]
    log, _ = build(rows, min_user_sessions=2, session_gap_seconds=100)
    assert log.user_ids.tolist() == [2]


def test_sessions_per_user_matches_a_loop() -> None:
    random = np.random.default_rng(1)
    lengths = np.array([0, 5, 1, 0, 40, 3, 0])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    times = np.concatenate([np.sort(random.integers(0, 500, n)) for n in lengths])
    expected = []
    for start, end in itertools.pairwise(offsets):
        own = times[start:end]
        expected.append(int(len(own) > 0) + sum(b - a > 30 for a, b in itertools.pairwise(own)))
    assert sessions_per_user(offsets, times, 30).tolist() == expected


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(DataError, match="no event is left"):
        build([(1, 1, 1, 1)], min_user_events=2)


def test_digest_is_of_the_ids_in_order() -> None:
    def expected(*texts: str) -> str:
        digest = hashlib.sha256()
        for text in texts:
            digest.update(len(text.encode()).to_bytes(4, "little") + text.encode())
        return digest.hexdigest()

    assert vocabulary_digest(np.array([1, 20], np.int32)) == expected("1", "20")
    assert vocabulary_digest(np.array([1, 20], np.int64)) == expected("1", "20")
    assert vocabulary_digest(np.array([20, 1])) != expected("1", "20")
    assert vocabulary_digest(np.array(["12", "0"])) != expected("1", "20")


def test_features_are_coded_and_missing_is_zero() -> None:
    side = SideTable(
        pa.array([12, 10, 99]),
        {"genre": pa.array(["b", "a", "z"]), "year": pa.array([None] * 3, pa.string())},
    )
    log, _ = build([(1, 10, 0, 1), (1, 11, 1, 1), (1, 12, 2, 0)], side=side)
    genre = log.item_features["genre"]
    assert genre.codes.tolist() == [1, 0, 2]
    assert genre.num_values == 3
    assert log.item_features["year"].codes.tolist() == [0, 0, 0]
    assert log.item_features["year"].num_values == 1
