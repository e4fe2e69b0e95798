"""Sequences for masked item modelling: only training history, every event once."""

import numpy as np
import pytest

from hpgr_plugin.data import LastFractionSplit, PreparedData, SequenceLoader
from hpgr_plugin.data.labels import label_column
from hpgr_plugin.data.log import TRAIN
from hpgr_plugin.data.prepare import prepare_data
from hpgr_plugin.data.synthetic import SyntheticReader


@pytest.fixture(params=["positives"])
def data(request: pytest.FixtureRequest) -> PreparedData:
    return prepare_data(
        reader=SyntheticReader(num_users=20, num_clusters=6, liked_clusters=1),
        label=label_column("is_click"),
        split=LastFractionSplit(test=0.3, validation=0.1),
        history_events=request.param,
        cache_dir=None,
    )


@pytest.mark.parametrize(("max_length", "min_length"), [(400, 1), (7, 1), (7, 3), (1, 1)])
def test_chunks_match_a_loop(data: PreparedData, max_length: int, min_length: int) -> None:
    log, expected = data.log, []
    for user, (start, end) in enumerate(zip(log.user_offsets, log.user_offsets[1:], strict=False)):
        mine = [r for r in range(start, end) if data.is_history[r] and data.split[r] == TRAIN]
        while mine:
            chunk, mine = mine[-max_length:], mine[:-max_length]
            if len(chunk) >= min_length:
                times, items = log.timestamp[chunk].tolist(), log.item[chunk].tolist()
                expected.append((user, times, items))
    loader = SequenceLoader(
        prepared=data, max_length=max_length, min_length=min_length, batch_tokens=100
    )
    assert loader.num_sequences == len(expected)
    found = []
    for batch in loader.batches(epoch=3):
        assert batch.items.numel() <= 100
        for b, user in enumerate(batch.users.tolist()):
            own = slice(*batch.offsets[b : b + 2].tolist())
            found.append((user, batch.timestamps[own].tolist(), batch.items[own].tolist()))
    assert sorted(found) == sorted(expected)


def test_nothing_after_the_training_part_is_seen(data: PreparedData) -> None:
    cut = {
        user: data.log.timestamp[(data.log.event_users() == user) & (data.split != TRAIN)].min()
        for user in range(data.log.num_users)
    }
    for batch in SequenceLoader(prepared=data, max_length=50).batches():
        lengths = batch.offsets.diff().numpy()
        users = np.repeat(batch.users.numpy(), lengths)
        assert all(
            time < cut[user] for user, time in zip(users, batch.timestamps.numpy(), strict=True)
        )


@pytest.mark.parametrize("data", ["all"], indirect=True)
def test_only_positive_events(data: PreparedData) -> None:
    log = data.log
    loader = SequenceLoader(prepared=data, max_length=1000, min_length=1, only_positive=True)
    rows = np.flatnonzero(data.is_history & (data.split == TRAIN) & (log.label == 1))
    assert 0 < len(rows) < (data.is_history & (data.split == TRAIN)).sum()
    whole = SequenceLoader(prepared=data, max_length=1000, min_length=1)
    found = np.concatenate([batch.items.numpy() for batch in loader.batches()])
    assert sorted(found) == sorted(log.item[rows])
    actions = {  # each event keeps its own
        (user, time, item): action
        for user, time, item, action in zip(
            log.event_users(), log.timestamp, log.item, log.action, strict=True
        )
    }
    for batch in whole.batches():
        users = np.repeat(batch.users.numpy(), batch.offsets.diff().numpy())
        events = zip(users, batch.timestamps.tolist(), batch.items.tolist(), strict=True)
        assert [actions[event] for event in events] == batch.actions.tolist()


def test_lengths_are_checked(data: PreparedData) -> None:
    with pytest.raises(ValueError, match="max_length"):
        SequenceLoader(prepared=data, max_length=0)
