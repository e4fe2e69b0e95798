"""Splits against loops over users."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from hpgr_plugin.data import GlobalTimeSplit, InteractionLog, LastFractionSplit, LastNSplit
from hpgr_plugin.data.build import build_log
from hpgr_plugin.data.events import EventTable
from hpgr_plugin.data.log import TEST, TRAIN, VALIDATION


def random_log(seed: int) -> tuple[InteractionLog, np.ndarray]:
    random = np.random.default_rng(seed)
    size = 300
    events = EventTable(
        user=pa.array(random.geometric(0.1, size)),
        item=pa.array(random.integers(0, 50, size)),
        timestamp=random.integers(0, 400, size),
        values={},
        candidate=random.random(size) < 0.7,
    )
    label = random.integers(0, 2, size).astype(np.int8)
    return build_log(events, label=label, action=label)


def users_rows(log: InteractionLog) -> list[np.ndarray]:
    return [
        np.arange(start, end)
        for start, end in zip(log.user_offsets[:-1], log.user_offsets[1:], strict=True)
    ]


def expected_last(log: InteractionLog, is_candidate: np.ndarray, counts) -> list[int]:  # type: ignore[no-untyped-def]
    code = np.zeros(log.num_events, dtype=int)
    for rows in users_rows(log):
        candidates = rows[is_candidate[rows]]
        test, validation = counts(len(candidates))
        split = [TRAIN] * len(candidates)
        for back in range(1, len(candidates) + 1):
            if back <= test:
                split[-back] = TEST
            elif back <= test + validation:
                split[-back] = VALIDATION
        for row in rows:
            later = [s for c, s in zip(candidates, split, strict=True) if c >= row]
            code[row] = later[0] if later else (split[-1] if split else TRAIN)
    return code.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_last_n(seed: int) -> None:
    log, is_candidate = random_log(seed)
    for test, validation in ((1, 1), (3, 2), (0, 2), (2, 0), (0, 0)):
        found = LastNSplit(test=test, validation=validation).assign(log, is_candidate)
        expected = expected_last(log, is_candidate, lambda n, t=test, v=validation: (t, v))
        assert found.tolist() == expected


@pytest.mark.parametrize("seed", range(5))
def test_last_fraction(seed: int) -> None:
    log, is_candidate = random_log(seed)
    found = LastFractionSplit(test=0.2, validation=0.1).assign(log, is_candidate)
    expected = expected_last(log, is_candidate, lambda n: (int(n * 0.2 + 0.5), int(n * 0.1 + 0.5)))
    assert found.tolist() == expected


@pytest.mark.parametrize(("test", "validation"), [(0.1, 0.1), (0.3, 0.0), (0.0, 0.3), (0.0, 0.0)])
def test_global_time(test: float, validation: float) -> None:
    log, is_candidate = random_log(3)
    code = GlobalTimeSplit(test=test, validation=validation).assign(log, is_candidate)
    times = log.timestamp
    for early, late in ((TRAIN, VALIDATION), (TRAIN, TEST), (VALIDATION, TEST)):
        if (code == early).any() and (code == late).any():
            assert times[code == early].max() < times[code == late].min()
    total = is_candidate.sum()
    ties = np.bincount(times[is_candidate]).max()
    for which, fraction in ((TEST, test), (VALIDATION, validation)):
        share = (is_candidate & (code == which)).sum()
        assert abs(share - fraction * total) <= ties + 1
        assert bool(share) == bool(fraction)


def test_an_impression_is_never_cut() -> None:
    log, is_candidate = random_log(4)
    group = np.arange(log.num_events) // 3
    grouped = dataclasses.replace(log, group=group)
    code = LastFractionSplit(test=0.3, validation=0.2).assign(grouped, is_candidate)
    users = log.event_users()
    for user, shown in set(zip(users.tolist(), group.tolist(), strict=True)):
        together = is_candidate & (users == user) & (group == shown)
        assert len(set(code[together].tolist())) <= 1
    assert {TRAIN, VALIDATION, TEST} == set(code[is_candidate].tolist())


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"0\.6 and 0\.5"):
        LastFractionSplit(test=0.6, validation=0.5)
    with pytest.raises(ValueError, match="-1"):
        GlobalTimeSplit(test=-1)
    with pytest.raises(ValueError, match="counts"):
        LastNSplit(test=-1)
