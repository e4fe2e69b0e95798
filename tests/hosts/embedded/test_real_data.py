"""Readers and requests on real logs; skipped, saying why, where a log is absent.

HPGR_DATA names a folder with ebnerd/, kuairand/, ml-1m/ or ml-100k/; unset, ../shared/data
beside the checkout is looked at. MovieLens is also found under downloads/.
"""

import os
from pathlib import Path

import gin
import numpy as np
import pytest

from hpgr_plugin.data import (
    Batch,
    EBNeRDReader,
    GlobalTimeSplit,
    KuaiRandReader,
    LastFractionSplit,
    MovieLensReader,
    PreparedData,
    RequestLoader,
    RequestSettings,
    TableReader,
    item_mean_scores,
    label_column,
    prepare_data,
    rating_at_least,
)
from hpgr_plugin.data.log import sessions_per_user
from hpgr_plugin.metrics import ranking_metrics

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _clear_gin() -> None:
    gin.clear_config()


def real(name: str, pattern: str) -> str:
    """The folder of this log, or a skip that says what was looked for and where."""
    named = os.environ.get("HPGR_DATA")
    base = Path(named) if named else ROOT.parent / "shared" / "data"
    places = [base / name, ROOT / "downloads" / name]
    for place in places:
        if any(place.glob(pattern)):
            return str(place)
    looked = " and ".join(str(place / pattern) for place in places)
    pytest.skip(f"no {name} data: {looked} are absent; HPGR_DATA names the folder of all logs")


def check_batches(data: PreparedData, settings: RequestSettings) -> None:
    """Every candidate arrives, and nothing from its request's future with it."""
    for split in ("train", "validation", "test"):
        loader = RequestLoader(prepared=data, split=split, settings=settings)
        seen = 0
        for batch in loader.batches():
            seen += batch.num_candidates
            assert_no_future(batch)
            assert int(batch.history_offsets.diff().max()) <= settings.max_history
        assert seen == loader.requests.candidate_count.sum() > 0


def assert_no_future(batch: Batch) -> None:
    some = batch.history_offsets.diff() > 0
    newest = batch.history_timestamps[batch.history_offsets[1:][some] - 1]
    last = batch.candidate_timestamps[batch.candidate_offsets[1:][some] - 1]
    assert bool((newest < last).all())


def quantiles(values: np.ndarray) -> list[int]:
    """Median, 90th percentile, maximum."""
    return [int(np.quantile(values, q)) for q in (0.5, 0.9, 1.0)]


def test_movielens_100k() -> None:
    reader = MovieLensReader(path=real("ml-100k", "ml-100k.inter"))
    data = prepare_data(
        reader=reader,
        label=rating_at_least(4.0),
        action="rating",
        split=LastFractionSplit(),
        cache_dir=None,
    )
    log = data.log
    assert (log.num_events, log.num_users, log.num_items) == (100_000, 943, 1682)
    assert log.num_actions == 5
    assert log.label.mean() == pytest.approx(0.55375)
    check_batches(data, RequestSettings(request_span_seconds=3600))


def test_movielens_1m() -> None:
    reader = MovieLensReader(path=real("ml-1m", "ratings.dat"), features=True)
    data = prepare_data(
        reader=reader, label=rating_at_least(4.0), split=LastFractionSplit(), cache_dir=None
    )
    log = data.log
    assert (log.num_events, log.num_users, log.num_items) == (1_000_209, 6040, 3706)
    assert log.label.mean() == pytest.approx(0.575, abs=1e-3)
    assert quantiles(np.diff(log.user_offsets)) == [96, 400, 2314]
    sessions = sessions_per_user(log.user_offsets, log.timestamp, 1800)
    assert quantiles(sessions) == [1, 8, 354]
    assert log.user_features["gender"].num_values == 3
    assert (log.item_features["year"].codes > 0).all()
    check_batches(data, RequestSettings(request_span_seconds=3600))
    assert ranking_metrics(*item_mean_scores(data, "test", RequestSettings())[:3])[
        "auc"
    ] == pytest.approx(0.748, abs=0.005)

    several = prepare_data(
        reader=reader,
        label=rating_at_least(4.0),
        split=LastFractionSplit(),
        min_user_sessions=5,
        cache_dir=None,
    )
    assert (several.log.num_users, several.log.num_events) == (1021, 372_117)


def test_kuairand_and_the_same_by_a_column_map() -> None:
    path = real("kuairand", "log_users_ge20.parquet")
    table = TableReader(
        path=path, item="video_id", timestamp="time_ms", time_unit="ms", files=("log*.parquet",)
    )
    settings = {"label": label_column("is_click"), "split": GlobalTimeSplit(), "cache_dir": None}
    reader = KuaiRandReader(path=path, video_columns=("author_id", "tag"))
    data, same = prepare_data(reader=reader, **settings), prepare_data(reader=table, **settings)
    log = data.log
    assert (log.num_events, log.num_users) == (74_038, 2541)
    assert log.label.mean() == pytest.approx(0.41, abs=0.005)
    assert quantiles(np.diff(log.user_offsets)) == [25, 42, 141]
    # In milliseconds one pause is just over 1800 s, in whole seconds it is not.
    assert quantiles(sessions_per_user(log.user_offsets, log.timestamp, 1800)) == [20, 30, 81]
    assert (log.item_features["author_id"].codes > 0).all()
    assert log.item_vocabulary_digest == same.log.item_vocabulary_digest
    np.testing.assert_array_equal(log.item, same.log.item)
    np.testing.assert_array_equal(log.timestamp, same.log.timestamp)
    check_batches(data, RequestSettings())


def test_ebnerd_lists_agree_with_the_flat_table() -> None:
    path = real("ebnerd", "test_behaviors_raw.parquet")
    real("ebnerd", "test_impressions.parquet")
    history = ("test_history_raw.parquet",)
    raw = EBNeRDReader(path=path, behaviors=("test_behaviors_raw.parquet",), history=history)
    flat = EBNeRDReader(path=path, behaviors=("test_impressions.parquet",), history=history)
    logs = []
    for reader in (raw, flat):
        events = reader.read(["is_click"])
        assert events.candidate is not None
        assert events.group is not None
        shown = events.candidate
        columns = (
            np.array(events.user.to_pylist())[shown],
            events.group[shown],
            np.array(events.item.to_pylist())[shown],
            events.timestamp[shown],
            events.values["is_click"][shown],
        )
        logs.append(np.unique(np.stack(columns).astype(np.int64), axis=1, return_counts=True))
    for first, second in zip(*logs, strict=True):
        np.testing.assert_array_equal(first, second)
    assert logs[0][1].sum() == 10_848
    assert len(np.unique(logs[0][0][0])) == 38


def test_ebnerd_demo_impressions_stay_whole_and_history_stays_before() -> None:
    reader = EBNeRDReader(
        path=real("ebnerd", "demo_impressions.parquet"),
        behaviors=("demo_impressions.parquet",),
        history=("demo_history.parquet",),
    )
    data = prepare_data(
        reader=reader,
        label=label_column("is_click"),
        split=LastFractionSplit(),
        history_events="positives",
        cache_dir=None,
    )
    log, asked = data.log, data.is_candidate
    assert asked.sum() == 583_054
    assert log.label[asked].mean() == pytest.approx(0.086, abs=0.001)
    assert log.group is not None
    splits_seen = {}
    for group, split in zip(log.group[asked].tolist(), data.split[asked].tolist(), strict=True):
        assert splits_seen.setdefault(group, split) == split
    assert len(splits_seen) == 50_080
    first = np.full(log.num_users, np.iinfo(np.int64).max)
    np.minimum.at(first, log.event_users()[asked], log.timestamp[asked])
    assert (log.timestamp[~asked] < first[log.event_users()[~asked]]).all()
    check_batches(data, RequestSettings(max_candidates=64))
