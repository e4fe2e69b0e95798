"""Ids are kept exactly, and what cannot be read is one line that names file, row or field."""

import gzip
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpgr_plugin.data import (
    DataError,
    EBNeRDReader,
    KuaiRandReader,
    LastNSplit,
    MovieLensReader,
    TableReader,
    label_column,
    prepare_data,
    rating_at_least,
)
from hpgr_plugin.errors import HpgrError

HEADER = "user_id,item_id,timestamp,label\n"


def csv_of(folder: Path, users: list[str], *, extra: str = "") -> TableReader:
    rows = "".join(f"{user},1,{second},1\n" for second, user in enumerate(users))
    (folder / "log.csv").write_text(HEADER + rows + extra)
    return TableReader(path=str(folder / "log.csv"))


def parquet_of(folder: Path, **columns: Any) -> TableReader:
    size = len(next(iter(columns.values()))) if columns else 2
    table = {name: list(range(size)) for name in ("user_id", "item_id", "timestamp", "label")}
    pq.write_table(pa.table({**table, **columns}), folder / "log.parquet")
    return TableReader(path=str(folder / "log.parquet"))


def prepared_users(reader: TableReader) -> list[Any]:
    """The ids after the whole way into the log."""
    data = prepare_data(
        reader=reader, label=rating_at_least(0.0, "label"), split=LastNSplit(), cache_dir=None
    )
    return data.log.user_ids.tolist()


def fails(reader: Any, field: str = "label") -> DataError:
    """The one-line error that reading ends in."""
    with pytest.raises(DataError) as caught:
        reader.read([field])
    message = str(caught.value)
    assert isinstance(caught.value, HpgrError)
    assert message.isprintable()
    assert len(message) < 1000
    assert caught.value.file is None or str(caught.value.file) in message
    return caught.value


@pytest.mark.parametrize(
    ("written", "ids"),
    [
        (["7", "07", "007"], ["7", "07", "007"]),
        (["18446744073709551615", "18446744073709551614"], [2**64 - 1, 2**64 - 2]),
        (["9007199254740993", "9007199254740992"], [2**53 + 1, 2**53]),
        (["-9223372036854775808", "5"], [-(2**63), 5]),
        (["9" * 30, "9" * 29 + "8"], ["9" * 30, "9" * 29 + "8"]),
        (["7.0", "8.0"], [7, 8]),
        ([" 7", "8"], [7, 8]),
        (["a", "nan"], ["a", "nan"]),
        (["0x10", "16"], ["0x10", "16"]),
    ],
)
def test_ids_of_text_files_are_kept_exactly(tmp_path: Path, written: list[str], ids: list) -> None:
    reader = csv_of(tmp_path, written)
    assert reader.read(["label"]).user.to_pylist() == ids
    assert sorted(prepared_users(reader), key=str) == sorted(ids, key=str)


def test_a_late_row_does_not_change_what_was_read_before(tmp_path: Path) -> None:
    reader = csv_of(tmp_path, [str(user) for user in range(100_000)], extra="x,1,5,1\n")
    assert reader.read(["label"]).user.to_pylist()[-2:] == ["99999", "x"]
    late = csv_of(tmp_path, [str(user) for user in range(100_000)], extra="1,1,noon,1\n")
    error = fails(late)
    assert (error.row, error.field) == (100_001, "timestamp")
    assert len(TableReader(path=late.path, drop_bad_rows=True).read(["label"]).user) == 100_000


@pytest.mark.parametrize(
    "users",
    [
        pa.array([2**63 + n for n in range(30)], pa.uint64()),
        pa.array([2**53 + n for n in range(30)], pa.int64()),
        pa.array(["7", "07", "007"]),
        pa.array(["10", "9"]),
        pa.array([1.0, 2.0**53 - 1]),
    ],
    ids=lambda array: str(array.type),
)
def test_ids_of_parquet_are_kept_exactly(tmp_path: Path, users: pa.Array) -> None:
    reader = parquet_of(tmp_path, user_id=users)
    assert reader.read(["label"]).user.to_pylist() == users.to_pylist()
    assert sorted(prepared_users(reader)) == sorted(users.to_pylist())


@settings(max_examples=60, deadline=None)
@given(users=st.lists(st.integers(-(2**63), 2**64 - 1), min_size=1, max_size=8, unique=True))
def test_any_integers_stay_apart(
    tmp_path_factory: pytest.TempPathFactory, users: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("ids")
    found = prepared_users(csv_of(folder, [str(user) for user in users]))
    assert sorted(map(str, found)) == sorted(map(str, users))


@pytest.mark.parametrize(
    ("users", "problem"),
    [
        (pa.array([1.0, 2.5]), "no id"),
        (pa.array([1.0, 2.0**53]), "may not hold exactly"),
        (pa.array([1.0, 1e19]), "may not hold exactly"),
        (pa.array(np.array([1, 2**24], np.float32)), "may not hold exactly"),
        (pa.array([1.0, float("inf")]), "no id"),
        (pa.array([1, None]), "no id"),
        (pa.array(["a", "b\0"]), "NUL"),
        (pa.array(["a", "b" * 5000]), "more than 1024"),
    ],
)
def test_an_id_that_is_not_exact_names_its_row(
    tmp_path: Path, users: pa.Array, problem: str
) -> None:
    error = fails(parquet_of(tmp_path, user_id=users))
    assert (error.row, error.field) == (2, "user_id")
    assert problem in str(error)


@pytest.mark.parametrize(
    "users", [["7.0", "7"], ["7", " 7"], ["1e3", "1000"], ["1", "NA"], ["1", "9007199254740993.0"]]
)
def test_one_number_written_in_two_ways_is_an_error(tmp_path: Path, users: list[str]) -> None:
    error = fails(csv_of(tmp_path, users))
    assert (error.row, error.field) == (2, "user_id")


def test_an_empty_file_does_not_turn_ids_into_text(tmp_path: Path) -> None:
    csv_of(tmp_path, ["10", "9"])
    (tmp_path / "a.csv").write_text(HEADER)
    reader = TableReader(path=str(tmp_path), group="label")
    assert reader.read(["label"]).user.to_pylist() == [10, 9]
    assert reader.read(["label"]).dropped == {"log.csv": 0, "a.csv": 0}


@pytest.mark.parametrize("rating", ["100", "-7", "1e308", "0"])
def test_ratings_outside_of_the_data_sets_range(tmp_path: Path, rating: str) -> None:
    (tmp_path / "u.data").write_text(f"1\t2\t4\t5\n1\t3\t{rating}\t6\n")
    error = fails(MovieLensReader(path=str(tmp_path)), "rating")
    assert (error.row, error.field) == (2, "rating")
    assert "0.5 to 5" in str(error)
    lenient = MovieLensReader(path=str(tmp_path), drop_bad_rows=True).read(["rating"])
    assert lenient.dropped == {"u.data": 1}


def test_flags_are_zero_or_one(tmp_path: Path) -> None:
    rows = "user_id,video_id,time_ms,is_click,tab\n1,2,5000,1,4\n1,3,6000,2,4\n"
    (tmp_path / "log_standard.csv").write_text(rows)
    error = fails(KuaiRandReader(path=str(tmp_path)), "is_click")
    assert (error.row, error.field) == (2, "is_click")
    assert KuaiRandReader(path=str(tmp_path)).read(["tab"]).values["tab"].tolist() == [4, 4]
    with pytest.raises(DataError, match="takes 0 or 1 as a label, got 3"):
        label_column("stars").labels(np.array([0.0, 1.0, 3.0]))


def test_a_click_on_an_article_that_is_not_in_view(tmp_path: Path) -> None:
    lists = pa.large_list(pa.int32())
    behaviors = {
        "impression_id": [50, 51, 52],
        "impression_time": pa.array([10**6] * 3, pa.timestamp("us")),
        "article_ids_inview": pa.array([[1, 2], [1, 2], []], lists),
        "article_ids_clicked": pa.array([[2], [3], [4]], lists),
        "user_id": [8, 8, 9],
    }
    history = {
        "user_id": [8],
        "impression_time_fixed": pa.array([[]], pa.large_list(pa.timestamp("us"))),
        "article_id_fixed": pa.array([[]], lists),
    }
    pq.write_table(pa.table(behaviors), tmp_path / "behaviors.parquet")
    pq.write_table(pa.table(history), tmp_path / "history.parquet")
    error = fails(EBNeRDReader(path=str(tmp_path)), "is_click")
    assert (error.row, error.field) == (2, "article_ids_clicked")
    events = EBNeRDReader(path=str(tmp_path), drop_bad_rows=True).read(["is_click"])
    assert events.item.to_pylist() == [1, 2]
    assert events.values["is_click"].tolist() == [0, 1]
    assert events.dropped["behaviors.parquet"] == 2


def test_more_actions_than_int16_holds(tmp_path: Path) -> None:
    size = 40_000
    reader = parquet_of(tmp_path, user_id=[1] * size, label=list(range(size)))
    data = prepare_data(
        reader=reader,
        label=rating_at_least(5.0, "label"),
        action="label",
        split=LastNSplit(),
        cache_dir=None,
    )
    assert data.log.num_actions == size
    assert data.log.action.tolist() == list(range(size))


@pytest.mark.parametrize("field", ["user_id", "item_id", "timestamp", "label"])
@pytest.mark.parametrize(
    "column",
    [
        pa.array([[1], [2]]),
        pa.array([{"a": 1}, {"a": 2}]),
        pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())),
    ],
    ids=["list", "struct", "map"],
)
def test_nested_columns_are_refused(tmp_path: Path, column: pa.Array, field: str) -> None:
    error = fails(parquet_of(tmp_path, **{field: column}))
    assert error.field == field
    assert "one value per row" in str(error)


@pytest.mark.parametrize("kind", ["string", "date32[day]", "bool", "duration[s]"])
def test_other_types_never_pass_as_numbers(tmp_path: Path, kind: str) -> None:
    columns = {
        "string": pa.array(["a", "b"]),
        "date32[day]": pa.array([1, 2], pa.date32()),
        "bool": pa.array([True, False]),
        "duration[s]": pa.array([1, 2], pa.duration("s")),
    }
    error = fails(parquet_of(tmp_path, timestamp=columns[kind]))
    assert error.field == "timestamp"


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    names = ["user_id", "item_id", "timestamp", "label", "label"]
    pq.write_table(pa.Table.from_arrays([pa.array([1])] * 5, names), tmp_path / "log.parquet")
    assert fails(TableReader(path=str(tmp_path / "log.parquet"))).field == "label"
    (tmp_path / "log.csv").write_text("user_id,user_id,item_id,timestamp,label\n1,1,1,1,1\n")
    assert fails(TableReader(path=str(tmp_path / "log.csv"))).field == "user_id"


def zipped(text: str, path: Path) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("log", text)
    return path.read_bytes()


@pytest.mark.parametrize("form", ["gzip", "zip", "binary", "utf-16", "giant", "giant header", ""])
def test_what_is_no_table_of_text(tmp_path: Path, form: str) -> None:
    text = HEADER + "1,1,1,1\n"
    content = {
        "gzip": gzip.compress(text.encode()),
        "zip": zipped(text, tmp_path / "a.zip"),
        "binary": bytes(range(256)) * 20,
        "utf-16": text.encode("utf-16"),
        "giant": (HEADER + "1,1," + "5" * 3_000_000 + ",1\n").encode(),
        "giant header": b"a" * 2_000_000,
        "": b"",
    }[form]
    (tmp_path / "log.csv").write_bytes(content)
    assert str(tmp_path / "log.csv") in str(fails(TableReader(path=str(tmp_path / "log.csv"))))


def test_control_characters_are_escaped(tmp_path: Path) -> None:
    reader = parquet_of(tmp_path, label=pa.array(["0", "a\nb\x1b[2J"]))
    assert "\\n" in str(fails(reader))
    folder = tmp_path / "line\nbreak"
    folder.mkdir()
    assert "line\\nbreak" in str(DataError("missing", file=folder))


@pytest.mark.parametrize("field", ["user_id", "timestamp", "label"])
def test_latin_1_names_file_and_row(tmp_path: Path, field: str) -> None:
    row = {"user_id": b"1", "item_id": b"1", "timestamp": b"5", "label": b"1", field: b"caf\xe9"}
    body = HEADER.encode() + b"1,1,5,1\n" * 100_000 + b",".join(row.values()) + b"\n"
    (tmp_path / "log.csv").write_bytes(body)
    error = fails(TableReader(path=str(tmp_path / "log.csv")))
    assert (error.row, error.field) == (100_001, field)


@pytest.mark.parametrize("drop", [False, True])
def test_a_malformed_row_of_latin_1(
    tmp_path: Path, drop: bool, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "log.csv").write_bytes(HEADER.encode() + b"1,1,1,1\n1,\xe9,1\n3,1,1,1\n")
    error = fails(TableReader(path=str(tmp_path / "log.csv"), drop_bad_rows=drop))
    assert error.row == 2
    assert "3 fields, expected 4" in str(error)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("unit", ["us", "ns"])
def test_times_that_datetime_cannot_hold_are_named(tmp_path: Path, unit: str) -> None:
    late = pa.array([0, 2**62 + 1 if unit == "us" else -1], pa.timestamp(unit))
    error = fails(parquet_of(tmp_path, timestamp=late))
    assert "a time too late" in str(error) or "a negative time" in str(error)
    assert "timestamp" in str(error)
