"""Generated bad data: each file is read, or ends in one line that names the file."""

import io
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpgr_plugin.data import (
    DataError,
    EBNeRDReader,
    LastNSplit,
    MovieLensReader,
    TableReader,
    prepare_data,
    rating_at_least,
)

CASES = int(os.environ.get("HPGR_BAD_CASES", "100"))
HEADER = b"user_id,item_id,timestamp,label\n"
FIELDS = (
    *("1", "2", "07", "7.0", "1e5", "nan", "", "NA", "x", "\u00e9", "\n", '"', ",", "\0", "-1"),
    *("18446744073709551615", "5" * 400, "2023-01-01", "true", " 3", "0.5", "inf", "-0", "1_0"),
    *("0x1F", "\r", "\u221e", "\uff11"),
)


class Case(NamedTuple):
    """One bad file.

    Attributes:
        kind: "table", "parquet", "movielens" or "ebnerd".
        content: of the file.
        drop: whether bad rows are dropped.
    """

    kind: str
    content: bytes
    drop: bool


def parquet(**columns: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


WHOLE = {
    "table": HEADER + b"1,2,3,1\n" * 20,
    "movielens": b"1\t2\t3\t4\n" * 10,
    "parquet": parquet(
        user_id=["7", "b", "9"] * 50,
        item_id=list(range(150)),
        timestamp=list(range(150)),
        label=[0.0, 1.0, 0.0] * 50,
    ),
    "ebnerd": parquet(
        user_id=[1, 2] * 10,
        impression_id=list(range(20)),
        impression_time=pa.array(range(20), pa.timestamp("us")),
        article_ids_inview=[[1, 2]] * 20,
        article_ids_clicked=[[1]] * 20,
    ),
}
HISTORY = parquet(user_id=[1], item_id=[1], ts=[1])


@st.composite
def damaged_files(draw: st.DrawFn) -> Case:
    """A whole file with some bytes overwritten, and perhaps its end cut off."""
    kind = draw(st.sampled_from(sorted(WHOLE)))
    content = bytearray(WHOLE[kind])
    places = st.integers(0, len(content) - 1)
    for place, value in draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=6)):
        content[place] = value
    if draw(st.integers(0, 9)) == 0:
        del content[draw(places) :]
    return Case(kind, bytes(content), draw(st.booleans()))


@st.composite
def strange_tables(draw: st.DrawFn) -> Case:
    """Rows of fields that are hard to read, some rows too long or too short."""
    rows = draw(st.lists(st.lists(st.sampled_from(FIELDS), min_size=3, max_size=5), max_size=4))
    body = "".join(",".join(row) + "\n" for row in rows)
    encoding = draw(st.sampled_from(["utf-8", "latin-1"]))
    return Case("table", HEADER + body.encode(encoding, "replace"), draw(st.booleans()))


def reader_of(case: Case, folder: Path) -> Any:
    """The reader of the case's file, written to the folder."""
    if case.kind == "ebnerd":
        (folder / "behaviors.parquet").write_bytes(case.content)
        (folder / "history.parquet").write_bytes(HISTORY)
        return EBNeRDReader(path=str(folder), drop_bad_rows=case.drop)
    names = {"table": "log.csv", "parquet": "log.parquet", "movielens": "u.data"}
    path = folder / names[case.kind]
    path.write_bytes(case.content)
    make = MovieLensReader if case.kind == "movielens" else TableReader
    return make(path=str(path), drop_bad_rows=case.drop)


def test_generated_bad_files(
    tmp_path_factory: pytest.TempPathFactory, count: Callable[..., None]
) -> None:
    seen: Counter[str] = Counter()

    @settings(
        max_examples=CASES,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(case=damaged_files() | strange_tables())
    def check(case: Case) -> None:
        folder = tmp_path_factory.mktemp("bad")
        reader = reader_of(case, folder)
        label = {"ebnerd": "is_click", "movielens": "rating"}.get(case.kind, "label")
        message = "read"
        try:
            prepare_data(
                reader=reader,
                label=rating_at_least(1.0, label),
                split=LastNSplit(),
                cache_dir=None,
            )
        except DataError as error:
            message = str(error)
        except Exception:
            seen.update({"cases": 1, "tracebacks": 1})
            raise
        named = str(folder) in message and message.isprintable()
        read = message == "read"
        empty = "no event is left" in message
        seen.update(
            {
                "cases": 1,
                "tracebacks": 0,
                "errors_that_name_it": named,
                "errors_that_do_not": not (named or read or empty),
                "files_that_can_be_read": read,
                "files_without_an_event": empty,
            }
        )
        assert named or read or empty, message

    try:
        check()
    finally:
        count("data", **seen)
    assert seen["cases"] >= CASES
    assert seen["errors_that_name_it"] > 0
