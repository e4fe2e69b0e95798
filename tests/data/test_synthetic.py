"""The synthetic log: what is planted can be found, and only there."""

import numpy as np

from hpgr_plugin.data import LastFractionSplit, SyntheticReader, label_column, prepare_data
from hpgr_plugin.data.log import sessions_per_user


def test_the_planted_answer_settles_every_candidate() -> None:
    reader = SyntheticReader(num_users=30, seed=3)
    truth = reader.truth()
    data = prepare_data(
        reader=reader, label=label_column("is_click"), split=LastFractionSplit(), cache_dir=None
    )
    log = data.log
    # The log holds the events in the order of the truth.
    np.testing.assert_array_equal(log.item_ids[log.item], truth.event_item)
    np.testing.assert_array_equal(log.user_ids[log.event_users()], truth.event_user)
    for row in np.flatnonzero(data.is_candidate):
        relevant = truth.relevant_rows(row)
        assert len(relevant) == reader.tells_per_cluster
        assert (log.timestamp[relevant] < log.timestamp[row]).all()
        assert (log.label[relevant] == log.label[row]).all()
        assert (
            truth.likes[truth.event_user[row], truth.item_cluster[truth.event_item[row]]]
            == (log.label[row])
        )


def test_sessions_are_the_planted_ones() -> None:
    reader = SyntheticReader(num_users=5, session_gap_seconds=3600)
    truth = reader.truth()
    data = prepare_data(
        reader=reader, label=label_column("is_click"), split=LastFractionSplit(), cache_dir=None
    )
    starts = np.add.reduceat(truth.session_start.astype(int), data.log.user_offsets[:-1])
    for gap in (60, 1800, 3599):
        found = sessions_per_user(data.log.user_offsets, data.log.timestamp, gap)
        np.testing.assert_array_equal(found, starts)
    one = sessions_per_user(data.log.user_offsets, data.log.timestamp, 3600)
    assert (one == 1).all()


def test_recent_history_tells_nothing() -> None:
    reader = SyntheticReader(num_users=10, distractors=30)
    truth = reader.truth()
    clusters = truth.item_cluster[truth.event_item].reshape(10, -1)
    old = 8 * reader.tells_per_cluster
    assert set(clusters[:, :old].ravel()) == set(range(8))
    assert set(clusters[:, old : old + 30].ravel()) == set(range(8, 16))
    assert set(clusters[:, old + 30 :].ravel()) <= set(range(8))


def test_noise_turns_labels_round() -> None:
    clean = SyntheticReader(num_users=100).read(["is_click"])
    noisy = SyntheticReader(num_users=100, label_noise=0.25).read(["is_click"])
    assert clean.candidate is not None
    differ = clean.values["is_click"] != noisy.values["is_click"]
    assert not differ[~clean.candidate].any()
    assert 0.2 < differ[clean.candidate].mean() < 0.3
