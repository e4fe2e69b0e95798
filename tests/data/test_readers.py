"""Readers: every format gives the same events, and a bad row is named or dropped."""

import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hpgr_plugin.data import (
    DataError,
    EBNeRDReader,
    KuaiRandReader,
    LastNSplit,
    MovieLensReader,
    TableReader,
    label_column,
    prepare_data,
)

RATINGS = [(7, 30, 4.0, 1000), (7, 10, 2.5, 900), (3, 30, 5.0, 950)]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def movielens(folder: Path, form: str) -> Path:
    rows = [(user, item, rating, time) for user, item, rating, time in RATINGS]
    if form == "inter":
        head = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        body = "".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t in rows)
        return write(folder / "any.inter", head + body)
    if form == "dat":
        body = "".join(f"{u}::{i}::{r}::{t}\n" for u, i, r, t in rows)
        return write(folder / "ratings.dat", body)
    if form == "csv":
        body = "".join(f"{u},{i},{r},{t}\n" for u, i, r, t in rows)
        return write(folder / "ratings.csv", "userId,movieId,rating,timestamp\n" + body)
    body = "".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t in rows)
    return write(folder / "u.data", body)


@pytest.mark.parametrize("form", ["inter", "dat", "csv", "data"])
def test_movielens_formats_agree(tmp_path: Path, form: str) -> None:
    file = movielens(tmp_path, form)
    for path in (file, tmp_path):
        events = MovieLensReader(path=str(path)).read(["rating"])
        assert events.user.to_pylist() == [7, 7, 3]
        assert events.item.to_pylist() == [30, 10, 30]
        assert events.timestamp.tolist() == [1000, 900, 950]
        assert events.values["rating"].tolist() == [4.0, 2.5, 5.0]
        assert events.candidate is None
        assert events.group is None


def test_movielens_dat_features(tmp_path: Path) -> None:
    movielens(tmp_path, "dat")
    write(tmp_path / "users.dat", "7::F::25::4::12345\n3::M::1::0::99999\n")
    title = "30::Léon: The Professional (1994)::Crime|Drama\n10::No year::\n".encode("latin-1")
    write(tmp_path / "movies.dat", title)
    events = MovieLensReader(path=str(tmp_path), features=True).read(["rating"])
    assert events.user_features is not None
    assert events.user_features.columns["gender"].to_pylist() == ["F", "M"]
    assert events.item_features is not None
    assert events.item_features.ids.to_pylist() == [30, 10]
    assert events.item_features.columns["year"].to_pylist() == ["1994", None]
    assert events.item_features.columns["genre"].to_pylist() == ["Crime", None]


def test_movielens_inter_features(tmp_path: Path) -> None:
    file = movielens(tmp_path, "inter")
    users = "user_id:token\tage:token\tgender:token\toccupation:token\n7\t17\tF\tx\n3\t56\tM\ty\n"
    write(tmp_path / "any.user", users)
    items = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    write(tmp_path / "any.item", items + '30\tA "quote\t1994\tCrime Drama\n')
    reader = MovieLensReader(path=str(tmp_path), features=True)
    assert reader.sources() == [file, tmp_path / "any.user", tmp_path / "any.item"]
    events = reader.read(["rating"])
    assert events.user_features is not None
    assert events.user_features.columns["age"].to_pylist() == ["0", "6"]
    assert events.item_features is not None
    assert events.item_features.columns["genre"].to_pylist() == ["Crime"]


def table_csv(folder: Path, rows: list[str]) -> TableReader:
    write(folder / "log.csv", "\n".join(["user_id,item_id,timestamp,label", *rows]) + "\n")
    return TableReader(path=str(folder / "log.csv"))


BAD_ROWS = {
    "negative time": ("1,2,-5,1", "timestamp"),
    "no time": ("1,2,,1", "timestamp"),
    "time is text": ("1,2,noon,1", "timestamp"),
    "milliseconds": ("1,2,1700000000000,1", "timestamp"),
    "NaN label": ("1,2,5,nan", "label"),
    "text label": ("1,2,5,yes", "label"),
    "no user": (",2,5,1", "user_id"),
    "no item": ("1,,5,1", "item_id"),
    "fractional item": ("1,2.5,5,1", "item_id"),
}


@pytest.mark.parametrize(("row", "field"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_bad_row_is_named_or_dropped(tmp_path: Path, row: str, field: str) -> None:
    reader = table_csv(tmp_path, ["1,2,3,0", "1,2,4,1", row, "1,3,6,0"])
    with pytest.raises(DataError) as caught:
        reader.read(["label"])
    assert (caught.value.row, caught.value.field) == (3, field)
    assert str(tmp_path / "log.csv") in str(caught.value)

    lenient = TableReader(path=reader.path, drop_bad_rows=True)
    events = lenient.read(["label"])
    assert events.timestamp.tolist() == [3, 4, 6]
    assert events.item.to_pylist() == [2, 2, 3]
    assert events.dropped == {"log.csv": 1}


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    body = b"user_id,item_id,timestamp,label\na,x,1,0\nb\xff,x,2,1\nc,x,3,1\n"
    path = str(write(tmp_path / "log.csv", body))
    with pytest.raises(DataError, match="not UTF-8") as caught:
        TableReader(path=path).read(["label"])
    assert (caught.value.row, caught.value.field) == (2, "user_id")
    events = TableReader(path=path, drop_bad_rows=True).read(["label"])
    assert events.user.to_pylist() == ["a", "c"]


@pytest.mark.parametrize("with_header", [True, False])
def test_a_row_with_another_number_of_fields(tmp_path: Path, with_header: bool) -> None:
    if with_header:
        reader: TableReader | MovieLensReader = table_csv(tmp_path, ["1,2,3,0", "1,2,4", "1,3,6,0"])
        lenient: TableReader | MovieLensReader = TableReader(path=reader.path, drop_bad_rows=True)
        field = "label"
    else:
        file = write(tmp_path / "ratings.dat", "1::2::3::4\n1::2::3\n1::3::4::6\n")
        reader = MovieLensReader(path=str(file))
        lenient = MovieLensReader(path=str(file), drop_bad_rows=True)
        field = "rating"
    with pytest.raises(DataError, match="fields") as caught:
        reader.read([field])
    assert caught.value.row == 2
    events = lenient.read([field])
    assert events.item.to_pylist() == [2, 3]
    assert sum(events.dropped.values()) == 1


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    reader = table_csv(tmp_path, ["1,2,3,0"])
    with pytest.raises(DataError, match="the file has user_id, item_id") as caught:
        reader.read(["rating"])
    assert caught.value.field == "rating"
    pq.write_table(pa.table({"user_id": [1], "item_id": [2]}), tmp_path / "log.parquet")
    with pytest.raises(DataError) as caught:
        TableReader(path=str(tmp_path / "log.parquet")).read([])
    assert caught.value.field == "timestamp"


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        TableReader(path=str(tmp_path / "nowhere")).read([])
    with pytest.raises(DataError, match="holds none of"):
        MovieLensReader(path=str(tmp_path)).read(["rating"])
    with pytest.raises(DataError, match="parquet"):
        TableReader(path=str(write(tmp_path / "log.parquet", "no"))).read([])


def test_table_reads_parquet_of_every_time_type(tmp_path: Path) -> None:
    seconds = [1_700_000_000, 1_700_000_001]
    moments = [datetime.datetime.fromtimestamp(s, datetime.timezone.utc) for s in seconds]
    columns = {
        "plain": (pa.array(seconds), "s"),
        "milliseconds": (pa.array([s * 1000 + 999 for s in seconds]), "ms"),
        "moments": (pa.array(moments, pa.timestamp("us", "UTC")), "s"),
        "floats": (pa.array([float(s) + 0.5 for s in seconds]), "s"),
    }
    for name, (column, unit) in columns.items():
        table = pa.table({"u": ["a", "b"], "i": [1, 2], "when": column, "like": [True, False]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
        path = str(tmp_path / f"{name}.parquet")
        reader = TableReader(path=path, user="u", item="i", timestamp="when", time_unit=unit)
        events = reader.read(["like"])
        assert events.timestamp.tolist() == seconds, name
        assert events.values["like"].tolist() == [1.0, 0.0]


def test_table_group_and_candidate(tmp_path: Path) -> None:
    columns = ["user_id", "item_id", "timestamp", "shown", "ranked"]
    rows = pd.DataFrame([(1, 5, 1, 9, 1), (1, 6, 2, 9, 0), (2, 5, 3, 8, 1)], columns=columns)
    rows.to_parquet(tmp_path / "a.parquet")
    rows.to_parquet(tmp_path / "b.parquet")
    reader = TableReader(path=str(tmp_path), group="shown", candidate="ranked")
    events = reader.read([])
    assert events.group is not None
    assert events.group.tolist() == [9, 9, 8, 9, 9, 8]
    assert events.candidate is not None
    assert events.candidate.tolist() == [True, False, True] * 2


def test_dictionary_and_chunked_ids(tmp_path: Path) -> None:
    users = pa.chunked_array([pa.array(["b", "a"]), pa.array(["b"])]).dictionary_encode()
    table = pa.table({"user_id": users, "item_id": [1, 2, 1], "timestamp": [1, 2, 3]})
    pq.write_table(table, tmp_path / "log.parquet", row_group_size=2)
    events = TableReader(path=str(tmp_path)).read([])
    assert events.user.to_pylist() == ["b", "a", "b"]


def test_side_features_of_a_table(tmp_path: Path) -> None:
    reader = table_csv(tmp_path, ["1,2,3,0"])
    body = b"item_id,maker,size\n2,caf\xe9,7\n3,x,8\n"
    side = write(tmp_path / "items.txt", body)
    reader = TableReader(path=reader.path, item_table=str(side), item_columns=("maker", "size"))
    features = reader.read([]).item_features
    assert features is not None
    assert features.ids.to_pylist() == [2, 3]
    assert features.columns["maker"].to_pylist() == [None, "x"]
    assert features.columns["size"].to_pylist() == ["7", "8"]
    assert reader.sources() == [tmp_path / "log.csv", side]


def test_kuairand_csv_and_parquet_agree(tmp_path: Path) -> None:
    rows = pd.DataFrame(
        {
            "user_id": [4, 4, 9],
            "video_id": [11, 12, 11],
            "time_ms": [1_650_000_000_999, 1_650_000_001_000, 1_650_000_002_500],
            "is_click": [1, 0, 1],
            "tab": [1, 4, 0],
            "author_id": [70, 71, 70],
        }
    )
    for name in ("csv", "parquet"):
        (tmp_path / name).mkdir()
    rows.iloc[:2].to_csv(tmp_path / "csv" / "log_standard_1.csv", index=False)
    rows.iloc[2:].to_csv(tmp_path / "csv" / "log_standard_2.csv", index=False)
    rows.to_csv(tmp_path / "csv" / "log_random_1.csv", index=False)
    rows.to_parquet(tmp_path / "parquet" / "log_any.parquet")
    read = [
        KuaiRandReader(path=str(tmp_path / name)).read(["is_click", "tab"])
        for name in ("csv", "parquet")
    ]
    for events in read:
        assert events.user.to_pylist() == [4, 4, 9]
        assert events.timestamp.tolist() == [1_650_000_000, 1_650_000_001, 1_650_000_002]
        assert events.values["tab"].tolist() == [1, 4, 0]
    reader = KuaiRandReader(path=str(tmp_path / "parquet"), video_columns=("author_id",))
    side = reader.read(["is_click"]).item_features
    assert side is not None
    assert side.columns["author_id"].to_pylist() == ["70", "71", "70"]


def moment(second: int) -> datetime.datetime:
    return datetime.datetime(2023, 5, 18) + datetime.timedelta(seconds=second)


START = int(datetime.datetime(2023, 5, 18, tzinfo=datetime.timezone.utc).timestamp())


def ebnerd(folder: Path, inview: list[list[int] | None]) -> EBNeRDReader:
    folder.mkdir(exist_ok=True)
    behaviors = pa.table(
        {
            "impression_id": pa.array([50, 51, 52], pa.uint32()),
            "impression_time": pa.array(
                [moment(100), moment(300), moment(200)], pa.timestamp("us")
            ),
            "article_ids_inview": pa.array(inview, pa.large_list(pa.int32())),
            "article_ids_clicked": pa.array([[2], [1], [3]], pa.large_list(pa.int32())),
            "user_id": pa.array([8, 8, 9], pa.uint32()),
        }
    )
    pq.write_table(behaviors, folder / "behaviors.parquet")
    history = pa.table(
        {
            "user_id": pa.array([8, 9, 7, 8], pa.uint32()),
            "impression_time_fixed": pa.array(
                [[moment(1), moment(100), moment(150)], [], [moment(2)], [moment(1)]],
                pa.large_list(pa.timestamp("us")),
            ),
            "article_id_fixed": pa.array([[6, 2, 5], [], [4], [6]], pa.large_list(pa.int32())),
        }
    )
    pq.write_table(history, folder / "history.parquet")
    return EBNeRDReader(path=str(folder))


def test_ebnerd_lists_become_events(tmp_path: Path) -> None:
    events = ebnerd(tmp_path, [[1, 2, 3], [1, 2], [3]]).read(["is_click"])
    # The reads at and after the first impression of user 8 are the impressions' own clicks, and
    # the one given twice counts once; user 7 has only a history.
    assert events.user.to_pylist() == [8, 7, 8, 8, 8, 8, 8, 9]
    assert events.item.to_pylist() == [6, 4, 1, 2, 3, 1, 2, 3]
    assert (events.timestamp - START).tolist() == [1, 2, 100, 100, 100, 300, 300, 200]
    assert events.values["is_click"].tolist() == [1, 1, 0, 1, 0, 1, 0, 1]
    assert events.candidate is not None
    assert events.candidate.tolist() == [False] * 2 + [True] * 6
    assert events.group is not None
    assert events.group.tolist() == [-1, -1, 50, 50, 50, 51, 51, 52]


def test_ebnerd_flat_tables_give_the_same(tmp_path: Path) -> None:
    raw = ebnerd(tmp_path / "raw", [[1, 2, 3], [1, 2], [3]]).read(["is_click"])
    flat = tmp_path / "flat"
    flat.mkdir()
    pd.DataFrame(
        {
            "impression_id": [50, 50, 50, 51, 51, 52],
            "user_id": [8, 8, 8, 8, 8, 9],
            "ts": [START + s for s in (100, 100, 100, 300, 300, 200)],
            "item_id": [1, 2, 3, 1, 2, 3],
            "label": [0, 1, 0, 1, 0, 1],
        }
    ).to_parquet(flat / "behaviors.parquet")
    pd.DataFrame(
        {"user_id": [8, 8, 7], "item_id": [6, 2, 4], "ts": [START + 1, START + 100, START + 2]}
    ).to_parquet(flat / "history.parquet")
    same = EBNeRDReader(path=str(flat)).read(["is_click"])
    assert same.user.to_pylist() == raw.user.to_pylist()
    assert same.item.to_pylist() == raw.item.to_pylist()
    np.testing.assert_array_equal(same.timestamp, raw.timestamp)
    np.testing.assert_array_equal(same.values["is_click"], raw.values["is_click"])
    np.testing.assert_array_equal(same.group, raw.group)


def test_ebnerd_bad_rows_carry_the_row_of_the_file(tmp_path: Path) -> None:
    inview = [[1, 2, 3], [1, None], [3]]
    with pytest.raises(DataError) as caught:
        ebnerd(tmp_path, inview).read(["is_click"])  # type: ignore[arg-type]
    assert (caught.value.row, caught.value.field) == (2, "item_id")
    with pytest.raises(DataError, match="no list") as caught:
        ebnerd(tmp_path, [[1], [1], None]).read(["is_click"])
    assert caught.value.row == 3
    with pytest.raises(DataError, match="is_click"):
        ebnerd(tmp_path, [[1], [1], [3]]).read(["rating"])


def test_kuairand_days_and_active_users(tmp_path: Path) -> None:
    """The recipe of the extract: some days, then users with enough exposures in them."""
    days = [20220424, 20220425, 20220425, 20220508, 20220509]
    rows = pd.DataFrame(
        {
            "user_id": [4, 4, 4, 9, 9],
            "video_id": [11, 12, 13, 11, 12],
            "date": days,
            "time_ms": [1_650_800_000_000 + 1000 * place for place in range(5)],
            "is_click": [1, 0, 1, 1, 0],
        }
    )
    rows.to_csv(tmp_path / "log_standard_1.csv", index=False)
    reader = KuaiRandReader(path=str(tmp_path), first_day=20220425, last_day=20220508)
    assert reader.read(["is_click"]).item.to_pylist() == [12, 13, 11]
    until = KuaiRandReader(path=str(tmp_path), last_day=20220425).read(["is_click"])
    assert until.item.to_pylist() == [11, 12, 13]
    data = prepare_data(
        reader=reader,
        label=label_column(field="is_click"),
        split=LastNSplit(test=0, validation=0),
        min_user_events=2,
        cache_dir=None,
    )
    assert data.log.user_ids.tolist() == [4]
    assert data.log.num_events == 2
    with pytest.raises(ValueError, match=r"first_day takes None or a day such as 20220425"):
        KuaiRandReader(first_day=425)
