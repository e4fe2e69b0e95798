"""Time and cross features against the obvious computation."""

import math
from datetime import datetime, timezone

import torch
from test_ranker import BATCH, NUM_ACTIONS, NUM_ITEMS, make_batch

from hpgr_plugin.hosts.embedded.model.cross_features import CrossFeatures
from hpgr_plugin.hosts.embedded.model.token_features import (
    CalendarFeatures,
    FeatureSizes,
    GapFeatures,
)
from hpgr_plugin.hosts.embedded.model.tokens import RequestIndex

SIZES = FeatureSizes(
    embedding_dim=8,
    num_actions=NUM_ACTIONS,
    item_feature_codes={"genre": torch.arange(NUM_ITEMS) % 4},
)


def test_the_calendar_is_that_of_the_clock() -> None:
    batch = make_batch(**BATCH)
    batch.history_timestamps += 891_000_000
    batch.candidate_timestamps[:] = torch.randint(-(10**9), 2 * 10**9, (batch.num_candidates,))
    features = CalendarFeatures(sizes=SIZES, utc_offset_hours=5.5)
    added = features(batch, RequestIndex.of(batch, hide_future=True))
    for times, got in (
        (batch.history_timestamps, added.history),
        (batch.candidate_timestamps, added.candidates),
    ):
        for seconds, row in zip(times.tolist(), got, strict=True):
            local = datetime.fromtimestamp(seconds + 5.5 * 3600, tz=timezone.utc)
            want = features.hour_table.weight[local.hour]
            assert torch.equal(row, want + features.weekday_table.weight[local.weekday()])


def test_the_gap_is_that_to_the_item_before() -> None:
    batch = make_batch(**BATCH)
    index = RequestIndex.of(batch, hide_future=True)
    features = GapFeatures(sizes=SIZES, buckets_per_octave=3)
    added = features(batch, index)

    def row(seconds: int | None) -> torch.Tensor:
        bucket = 0 if seconds is None else 1 + int(3 * math.log2(1 + seconds))
        return features.gap_table.weight[bucket]

    times, starts = batch.history_timestamps.tolist(), batch.history_offsets.tolist()
    for j, rank in enumerate(index.history_ranks.tolist()):
        assert torch.equal(added.history[j], row(times[j] - times[j - 1] if rank else None))
    for c, visible in enumerate(index.visible.tolist()):
        start = starts[int(index.candidate_users[c])]
        last = times[start + visible - 1] if visible else None
        gap = None if last is None else int(batch.candidate_timestamps[c]) - last
        assert gap is None or gap > 0
        assert torch.equal(added.candidates[c], row(gap))


def test_gaps_without_any_history() -> None:
    batch = make_batch([0, 0], [2, 1])
    features = GapFeatures(sizes=SIZES)
    added = features(batch, RequestIndex.of(batch, hide_future=True))
    assert torch.equal(added.candidates, features.gap_table.weight[[0, 0, 0]])


def test_the_longest_gap_has_a_bucket() -> None:
    batch = make_batch([2], [1])
    batch.history_timestamps[:] = torch.tensor([0, 10**12])
    batch.candidate_timestamps[:] = 2 * 10**12
    features = GapFeatures(sizes=SIZES)
    added = features(batch, RequestIndex.of(batch, hide_future=True))
    assert torch.equal(added.candidates[0], features.gap_table.weight[-1])


def test_cross_features_are_counts_and_shares_before_the_candidate() -> None:
    batch = make_batch(**BATCH)
    batch.candidate_items[0] = batch.history_items[0]
    index = RequestIndex.of(batch, hide_future=True)
    got = CrossFeatures(sizes=SIZES).statistics(batch, index)
    starts = batch.history_offsets.tolist()
    found = 0
    for c in range(batch.num_candidates):
        start = starts[int(index.candidate_users[c])]
        rows = range(start, start + int(index.visible[c]))
        item = int(batch.candidate_items[c])
        want: list[float] = []
        for matches in (
            lambda _: True,
            lambda other, item=item: other == item,
            lambda other, item=item: other % 4 == item % 4,
        ):
            actions = [
                int(batch.history_actions[j]) for j in rows if matches(int(batch.history_items[j]))
            ]
            shares = [actions.count(a) / max(1, len(actions)) for a in range(NUM_ACTIONS)]
            want += [math.log1p(len(actions)), *shares]
            found += len(actions)
        torch.testing.assert_close(got[c], torch.tensor(want))
    assert found > batch.num_candidates
