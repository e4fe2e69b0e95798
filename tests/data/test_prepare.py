"""prepare_data: the cache returns the same, knows its source, and survives a kill."""

import dataclasses
import multiprocessing
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from hpgr_plugin.data import (
    DataError,
    InteractionLog,
    LastFractionSplit,
    LastNSplit,
    PreparedData,
    RequestSettings,
    TableReader,
    prepare_data,
)
from hpgr_plugin.data import cache as cache_module
from hpgr_plugin.data.baselines import item_mean_scores
from hpgr_plugin.data.events import EventTable
from hpgr_plugin.data.labels import label_column, rating_at_least


def write_log(folder: Path, extra: str = "") -> Path:
    random = np.random.default_rng(0)
    limits = [(0, 9), (0, 30), (0, 10**6), (1, 6)]
    columns = [random.integers(low, high, 300) for low, high in limits]
    rows = [
        f"u{user},{item},{when},{stars}" for user, item, when, stars in zip(*columns, strict=True)
    ]
    folder.mkdir(exist_ok=True)
    path = folder / "log.csv"
    path.write_text("\n".join(["user_id,item_id,timestamp,rating", *rows]) + "\n" + extra)
    users = "user_id,city\n" + "".join(f"u{user},c{user % 2}\n" for user in range(9))
    (folder / "users.tsv").write_text(users)
    return path


def prepare(path: Path, cache: Path | None, **changes) -> PreparedData:  # type: ignore[no-untyped-def]
    reader = TableReader(
        path=str(path), user_table=str(path.parent / "users.tsv"), user_columns=("city",)
    )
    settings = {
        "reader": reader,
        "label": rating_at_least(4.0),
        "action": "rating",
        "split": LastFractionSplit(),
        "cache_dir": None if cache is None else str(cache),
    }
    return prepare_data(**(settings | changes))


def assert_same(one: PreparedData, other: PreparedData) -> None:
    for name in ("split", "is_history", "is_candidate"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for f in dataclasses.fields(InteractionLog):
        mine, theirs = getattr(one.log, f.name), getattr(other.log, f.name)
        if f.name.endswith("_features"):
            assert mine.keys() == theirs.keys()
            for name in mine:
                np.testing.assert_array_equal(mine[name].codes, theirs[name].codes)
                assert mine[name].num_values == theirs[name].num_values
        else:
            np.testing.assert_array_equal(mine, theirs)
    assert one.dropped == other.dropped


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


def test_the_cache_returns_the_same_and_maps_it(tmp_path: Path) -> None:
    path, cache = write_log(tmp_path / "data"), tmp_path / "cache"
    fresh, first, second = prepare(path, None), prepare(path, cache), prepare(path, cache)
    assert_same(fresh, first)
    assert_same(first, second)
    assert isinstance(second.log.item, np.memmap)
    assert len(entries(cache)) == 1
    assert second.log.num_actions == 5


def test_the_key_is_content_and_settings_not_the_place(tmp_path: Path) -> None:
    path, cache = write_log(tmp_path / "data"), tmp_path / "cache"
    prepare(path, cache)
    prepare(write_log(tmp_path / "elsewhere"), cache)
    assert len(entries(cache)) == 1
    other = {"split": LastNSplit(), "label": rating_at_least(5.0), "history_events": "positives"}
    for number, (name, value) in enumerate(other.items(), start=2):
        prepare(path, cache, **{name: value})
        assert len(entries(cache)) == number
    prepare(write_log(tmp_path / "data", extra="u1,2,3,4\n"), cache)
    assert len(entries(cache)) == 5


def test_history_events(tmp_path: Path) -> None:
    path = write_log(tmp_path / "data")
    assert prepare(path, None).is_history.all()
    positives = prepare(path, None, history_events="positives")
    np.testing.assert_array_equal(positives.is_history, positives.log.label == 1)
    assert positives.is_candidate.all()
    with pytest.raises(ValueError, match="'clicks'"):
        prepare(path, None, history_events="clicks")


def test_a_log_without_rows_is_an_error(tmp_path: Path) -> None:
    path = write_log(tmp_path / "data")
    path.write_text("user_id,item_id,timestamp,rating\n")
    with pytest.raises(DataError, match="no event is left"):
        prepare(path, None)


def test_dropped_rows_are_counted_and_kept_in_the_cache(tmp_path: Path) -> None:
    path, cache = write_log(tmp_path / "data", extra="u1,2,-3,4\nu1,2\n"), tmp_path / "cache"
    with pytest.raises(DataError, match="row 302"):
        prepare(path, cache)
    assert entries(cache) == []
    reader = TableReader(path=str(path), drop_bad_rows=True)
    for _ in range(2):
        assert prepare(path, cache, reader=reader).dropped == {"log.csv": 2}


class Slow:
    """A remark whose writing takes so long that its process can be killed in the middle."""

    def __init__(self, reached: Path) -> None:
        self.reached = reached

    def __str__(self) -> str:
        self.reached.touch()
        time.sleep(60)
        return "never"


def store_slowly(path: Path, entry: Path, reached: Path) -> None:
    with cache_module.exclusive(entry):
        prepared = prepare(path, None)
        slow = dataclasses.replace(prepared, settings={"remark": Slow(reached)})
        cache_module.store(entry, slow)


def test_a_kill_half_way_leaves_nothing_half(tmp_path: Path) -> None:
    path, cache, reached = write_log(tmp_path / "data"), tmp_path / "cache", tmp_path / "reached"
    prepare(path, tmp_path / "other")
    entry = cache / entries(tmp_path / "other")[0].name
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=store_slowly, args=(path, entry, reached))
    process.start()
    while not reached.exists():
        assert process.is_alive()
        time.sleep(0.05)
    process.kill()
    process.join()
    half = entries(cache)
    assert len(half) == 1
    assert half[0] != entry
    assert (half[0] / "item.npy").exists()
    assert_same(prepare(path, cache), prepare(path, None))
    assert entries(cache) == [entry]


def test_concurrent_processes_share_one_entry(tmp_path: Path) -> None:
    path, cache = write_log(tmp_path / "data"), tmp_path / "cache"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=prepare, args=(path, cache)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(entries(cache)) == 1
    assert_same(prepare(path, cache), prepare(path, None))


def test_a_damaged_entry_is_named(tmp_path: Path) -> None:
    path, cache = write_log(tmp_path / "data"), tmp_path / "cache"
    prepare(path, cache)
    item = entries(cache)[0] / "item.npy"
    item.write_bytes(item.read_bytes()[:-40])
    with pytest.raises(DataError, match="damaged cache entry") as caught:
        prepare(path, cache)
    assert str(entries(cache)[0]) in str(caught.value)


@pytest.mark.parametrize("name", ["item.npy", "user_features.0.npy", "meta.json", "checksums.json"])
def test_a_flipped_bit_is_an_error_that_names_the_file(tmp_path: Path, name: str) -> None:
    path, cache = write_log(tmp_path / "data"), tmp_path / "cache"
    prepare(path, cache)
    file = entries(cache)[0] / name
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="damaged cache entry") as caught:
        prepare(path, cache)
    assert str(file.parent) in str(caught.value)
    if name != "checksums.json":  # its flipped checksum accuses another file
        assert str(file) in str(caught.value)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    path, cache = write_log(tmp_path / "data"), tmp_path / "cache"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limit[1]))
    try:
        with pytest.raises(DataError, match="cannot be written"):
            prepare(path, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert entries(cache) == []
    prepare(path, cache)


@dataclasses.dataclass(frozen=True)
class FixedReader:
    """Two users, four items; the last event of each is the test event."""

    def sources(self) -> list[Path]:
        return []

    def read(self, fields: list[str]) -> EventTable:
        import pyarrow as pa

        return EventTable(
            user=pa.array([1, 1, 1, 2, 2, 2]),
            item=pa.array([1, 2, 1, 1, 3, 4]),
            timestamp=np.array([1, 2, 3, 1, 2, 3]),
            values={"label": np.array([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])},
        )


def test_item_mean_uses_only_training_labels() -> None:
    data = prepare_data(
        reader=FixedReader(),
        label=label_column(),
        split=LastNSplit(test=1, validation=0),
        cache_dir=None,
    )
    scored = item_mean_scores(data, "test", RequestSettings(), prior_events=2.0)
    # Training mean 3/4; item 1: two positives of two; item 4: never seen.
    np.testing.assert_allclose(scored.scores, [(2 + 2 * 0.75) / 4, 0.75])
    assert scored.labels.tolist() == [0, 1]
    assert scored.users.tolist() == [0, 1]
