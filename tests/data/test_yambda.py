"""The Yambda reader on generated files with the data set's schema."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hpgr_plugin.data import DataError, GlobalTimeSplit, YambdaReader, prepare_data, rating_at_least
from hpgr_plugin.errors import HpgrError

FIELDS = ["played_ratio_pct", "action", "is_organic"]
UID = [100, 100, 100, 100, 200, 200]
ITEM = [7, 7, 8, 9, 7, 9]
TIME = [0, 5, 5, 60, 10, 15]
TYPE = ["listen", "like", "dislike", "listen", "listen", "unlike"]
PLAYED = [100, None, None, 12, 50, None]


def columns(rows: list[int]) -> dict[str, pa.Array]:
    """The flat columns with their types in the data set."""

    def of(values: list, kind: pa.DataType) -> pa.Array:
        return pa.array([values[row] for row in rows], kind)

    return {
        "uid": of(UID, pa.uint32()),
        "timestamp": of(TIME, pa.uint32()),
        "item_id": of(ITEM, pa.uint32()),
        "is_organic": of([1, 1, 0, 0, 1, 1], pa.uint8()),
        "played_ratio_pct": of(PLAYED, pa.uint16()),
        "track_length_seconds": of([200, None, None, 180, 200, None], pa.uint32()),
        "event_type": of(TYPE, pa.string()).dictionary_encode(),
    }


def write_multi_event(folder: Path, **changes: pa.Array) -> YambdaReader:
    pq.write_table(pa.table(columns(list(range(6))) | changes), folder / "multi_event.parquet")
    return YambdaReader(path=str(folder))


def test_listens_are_candidates_and_the_rest_is_history(tmp_path: Path) -> None:
    events = write_multi_event(tmp_path).read(FIELDS)
    assert events.user.to_pylist() == UID[:5]
    assert events.item.to_pylist() == ITEM[:5]
    assert events.timestamp.tolist() == TIME[:5]
    assert events.candidate is not None
    assert events.candidate.tolist() == [True, False, False, True, True]
    assert events.values["played_ratio_pct"].tolist() == [100, 0, 0, 12, 50]
    assert events.values["action"].tolist() == [1, 2, 3, 0, 1]
    assert events.values["is_organic"].tolist() == [1, 1, 0, 0, 1]


def test_one_file_per_type_gives_the_same_events(tmp_path: Path) -> None:
    for event, name in (("listen", "listens"), ("like", "likes"), ("dislike", "dislikes")):
        chosen = columns([row for row in range(6) if TYPE[row] == event])
        del chosen["event_type"]
        if event != "listen":
            del chosen["played_ratio_pct"], chosen["track_length_seconds"]
        pq.write_table(pa.table(chosen), tmp_path / f"{name}.parquet")
    events = YambdaReader(path=str(tmp_path)).read(FIELDS)
    (tmp_path / "all").mkdir()
    together = write_multi_event(tmp_path / "all").read(FIELDS)

    def rows(table: object) -> list:
        values = [table.values[name].tolist() for name in FIELDS]
        return sorted(
            zip(table.user.to_pylist(), table.item.to_pylist(), table.timestamp, *values)  # noqa: B905
        )

    assert rows(events) == rows(together)


def test_the_types_to_read_are_chosen(tmp_path: Path) -> None:
    write_multi_event(tmp_path)
    listens = YambdaReader(path=str(tmp_path), events=("listen",)).read(FIELDS)
    assert listens.timestamp.tolist() == [0, 60, 10]
    everything = ("listen", "like", "dislike", "unlike", "undislike")
    assert YambdaReader(path=str(tmp_path), events=everything).read(FIELDS).values[
        "action"
    ].tolist() == [1, 2, 3, 0, 1, 4]
    with pytest.raises(HpgrError, match=r"YambdaReader\.events takes 'listen'"):
        YambdaReader(events=("like",))


def test_bad_rows_are_named(tmp_path: Path) -> None:
    strange = pa.array(["listen", "like", "skip", "listen", "listen", "like"])
    reader = write_multi_event(tmp_path, event_type=strange)
    with pytest.raises(DataError, match="'skip'") as caught:
        reader.read(FIELDS)
    assert (caught.value.row, caught.value.field) == (3, "event_type")
    reader = YambdaReader(path=str(tmp_path), drop_bad_rows=True)
    events = reader.read(FIELDS)
    assert events.timestamp.tolist() == [0, 5, 60, 10, 15]
    assert events.dropped == {"multi_event.parquet": 1}
    # A listen without a share: the second listen is row 4 of the file.
    reader = write_multi_event(tmp_path, played_ratio_pct=pa.array([9, None, None, None, 5, None]))
    with pytest.raises(DataError, match="not a number") as caught:
        reader.read(FIELDS)
    assert caught.value.row == 4
    with pytest.raises(DataError, match="only the fields"):
        reader.read(["rating"])


def test_it_prepares_a_log(tmp_path: Path) -> None:
    data = prepare_data(
        reader=write_multi_event(tmp_path),
        label=rating_at_least(field="played_ratio_pct", threshold=50.0),
        action="action",
        split=GlobalTimeSplit(test=0.3, validation=0.0),
        cache_dir=None,
    )
    assert data.log.num_actions == 4
    assert data.is_candidate.sum() == 3
    assert data.log.label[data.is_candidate].tolist() == [1, 0, 1]


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"listens\.parquet"):
        YambdaReader(path=str(tmp_path)).read(FIELDS)
