"""Statistics before each event: against a loop, and what must not leak into them."""

from dataclasses import replace

import numpy as np
import pytest

from hpgr_plugin.data import (
    GlobalTimeSplit,
    LastFractionSplit,
    PreparedData,
    RequestLoader,
    RequestSettings,
    SyntheticReader,
    label_column,
    prepare_data,
)
from hpgr_plugin.data.log import TRAIN


def data(split: object | None = None) -> PreparedData:
    """A log with many ties in time, so that "strictly before" matters."""
    prepared = prepare_data(
        reader=SyntheticReader(num_users=20),
        label=label_column(field="is_click"),
        split=split or LastFractionSplit(test=0.2),
        cache_dir=None,
    )
    log = prepared.log
    return replace(prepared, log=replace(log, timestamp=log.timestamp // 2000 * 2000))


def relabelled(prepared: PreparedData, rows: np.ndarray) -> PreparedData:
    label = prepared.log.label.copy()
    label[rows] = 1 - label[rows]
    return replace(prepared, log=replace(prepared.log, label=label))


def differing(one: PreparedData, other: PreparedData) -> np.ndarray:
    """Events with another feature, bool [E]."""
    columns = zip(one.statistics, other.statistics, strict=True)
    return np.any([a != b for a, b in columns], axis=0)


@pytest.mark.parametrize("split", [LastFractionSplit(test=0.2), GlobalTimeSplit(test=0.2)])
def test_they_are_those_of_a_loop(split: object) -> None:
    prepared = data(split)
    log, user = prepared.log, prepared.log.event_users()
    counted = prepared.is_candidate & (prepared.split == TRAIN)
    found = prepared.statistics
    for event in range(0, log.num_events, 7):
        before = counted & (log.timestamp < log.timestamp[event])
        item = before & (log.item == log.item[event])
        own = before & (user == user[event])
        expected = [item.sum(), log.label[item].sum(), own.sum(), log.label[own].sum()]
        assert [column[event] for column in found] == expected


def test_a_label_changes_only_later_events() -> None:
    prepared = data()
    train = np.flatnonzero(prepared.is_candidate & (prepared.split == TRAIN))
    for row in train[:: len(train) // 40]:
        changed = differing(prepared, relabelled(prepared, np.array([row])))
        assert not changed[prepared.log.timestamp <= prepared.log.timestamp[row]].any()


def test_labels_of_validation_and_test_enter_nothing() -> None:
    for split in (LastFractionSplit(test=0.2), GlobalTimeSplit(test=0.2)):
        prepared = data(split)
        held_out = np.flatnonzero(prepared.split != TRAIN)
        assert len(held_out)
        assert not differing(prepared, relabelled(prepared, held_out)).any()


def test_batches_carry_them_when_asked() -> None:
    prepared = data()
    arguments = {"prepared": prepared, "split": "test", "settings": RequestSettings()}
    assert next(iter(RequestLoader(**arguments).batches())).candidate_features == {}
    loader = RequestLoader(**arguments, statistics=True)
    rows, batches = loader.candidate_rows(), list(loader.batches())
    for name, column in prepared.statistics._asdict().items():
        found = np.concatenate([batch.candidate_features[name].numpy() for batch in batches])
        np.testing.assert_array_equal(found, column[rows])
    items = np.concatenate([batch.candidate_items.numpy() for batch in batches])
    np.testing.assert_array_equal(items, prepared.log.item[rows])
