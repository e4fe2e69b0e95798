"""MovieLens: `ratings.dat` (1M, 10M), `ratings.csv` (20M and later), `u.data` and `.inter`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from hpgr_plugin.data.errors import DataError
from hpgr_plugin.data.events import EventTable, SideTable, location
from hpgr_plugin.data.readers.assemble import EventColumns, check_events
from hpgr_plugin.data.readers.files import existing, matching, read_csv
from hpgr_plugin.data.readers.side import read_side_table

_PATTERNS = ("*.inter", "ratings.dat", "ratings.csv", "u.data")
_YEAR = re.compile(r"\((\d{4})\)\s*$")
_AGE_BRACKETS = (18, 25, 35, 45, 50, 56)


@dataclass(frozen=True, kw_only=True)
class MovieLensReader:
    """Ratings of MovieLens in any of its formats; the field for labels is `rating`.

    Args:
        path: the folder, or the ratings file itself.
        features: also read gender, age and occupation of users, first genre and year of
            movies, from the files beside the ratings.
        drop_bad_rows: drop and count bad rows instead of raising.
    """

    path: str = location("")
    features: bool = False
    drop_bad_rows: bool = False

    def sources(self) -> list[Path]:
        """The ratings, and the files of features where they are read."""
        ratings = self._ratings()
        return [ratings, *(_feature_files(ratings) if self.features else [])]

    def read(self, fields: Sequence[str]) -> EventTable:
        """The ratings, in the order of the file."""
        file = self._ratings()
        columns, options = _layout(file)
        wanted = columns.with_fields(fields)
        table, malformed = read_csv(file, wanted, drop_bad_rows=self.drop_bad_rows, **options)
        events = check_events(
            table,
            file,
            columns,
            fields=fields,
            drop_bad_rows=self.drop_bad_rows,
            malformed=malformed,
        )
        users, items = _features(file) if self.features else (None, None)
        return replace(events, user_features=users, item_features=items)

    def _ratings(self) -> Path:
        return matching(existing(self.path), _PATTERNS)[0]


def _layout(file: Path) -> tuple[EventColumns, dict[str, Any]]:
    """The names of the columns, and how to read the file."""
    names = EventColumns("user_id", "item_id", "timestamp")
    if file.suffix == ".inter":
        return names, {"delimiter": "\t", "typed_header": True, "quoted": False}
    if file.suffix == ".dat":
        # Fields are parted by "::", which a one-character delimiter sees as an empty column.
        header = ["user_id", "_1", "item_id", "_2", "rating", "_3", "timestamp"]
        return names, {"delimiter": ":", "header": header, "quoted": False}
    if file.suffix == ".csv":
        return EventColumns("userId", "movieId", "timestamp"), {}
    if file.name == "u.data":
        header = ["user_id", "item_id", "rating", "timestamp"]
        return names, {"delimiter": "\t", "header": header, "quoted": False}
    raise DataError(f"none of {', '.join(_PATTERNS)}", file=file)


def _feature_files(ratings: Path) -> list[Path]:
    pairs = {
        ".inter": (f"{ratings.stem}.user", f"{ratings.stem}.item"),
        ".dat": ("users.dat", "movies.dat"),
        ".csv": ("movies.csv",),
    }
    return [existing(ratings.parent / name) for name in pairs.get(ratings.suffix, ())]


def _features(ratings: Path) -> tuple[SideTable | None, SideTable | None]:
    files = _feature_files(ratings)
    if ratings.suffix == ".inter":
        return _inter_users(files[0]), _inter_items(files[1])
    if ratings.suffix == ".dat":
        return _dat_users(files[0]), _titled_movies(files[1], _dat_rows(files[1], 3))
    if ratings.suffix == ".csv":
        side = read_side_table(files[0], "movieId", ["title", "genres"])
        columns = [side.columns[name].to_pylist() for name in ("title", "genres")]
        return None, _titled_movies(
            files[0], list(zip(side.ids.to_pylist(), *columns, strict=True))
        )
    raise DataError("this format has no features here; set features=False", file=ratings)


def _inter_users(file: Path) -> SideTable:
    columns = ["age", "gender", "occupation"]
    side = read_side_table(
        file, "user_id", columns, delimiter="\t", typed_header=True, quoted=False
    )
    return SideTable(side.ids, {**side.columns, "age": _bracketed(side.columns["age"])})


def _inter_items(file: Path) -> SideTable:
    side = read_side_table(
        file, "item_id", ["release_year", "class"], delimiter="\t", typed_header=True, quoted=False
    )
    genres = [_first(genre, " ") for genre in side.columns["class"].to_pylist()]
    return SideTable(
        side.ids, {"year": side.columns["release_year"], "genre": pa.array(genres, pa.string())}
    )


def _bracketed(ages: pa.Array) -> pa.Array:
    """Years of age in the brackets that MovieLens-1M uses."""
    years = [int(age) if age and age.isdigit() else None for age in ages.to_pylist()]
    brackets = [
        None if year is None else str(sum(year >= limit for limit in _AGE_BRACKETS))
        for year in years
    ]
    return pa.array(brackets, pa.string())


def _dat_users(file: Path) -> SideTable:
    rows = _dat_rows(file, 5)
    columns = {
        name: pa.array([row[place] for row in rows], pa.string())
        for name, place in (("gender", 1), ("age", 2), ("occupation", 3))
    }
    return SideTable(pa.array([int(row[0]) for row in rows]), columns)


def _titled_movies(file: Path, rows: Sequence[Sequence[Any]]) -> SideTable:
    """Year and first genre from rows of (id, title (year), genre|genre)."""
    years = [_YEAR.search(row[1] or "") for row in rows]
    return SideTable(
        pa.array([int(row[0]) for row in rows]),
        {
            "year": pa.array([year.group(1) if year else None for year in years], pa.string()),
            "genre": pa.array([_first(row[2], "|") for row in rows], pa.string()),
        },
    )


def _dat_rows(file: Path, num_fields: int) -> list[list[str]]:
    """Rows of a "::" table; movie titles in these files are Latin-1."""
    rows = [line.split("::") for line in file.read_text(encoding="latin-1").splitlines() if line]
    for number, row in enumerate(rows, start=1):
        if len(row) != num_fields:
            problem = f"{len(row)} fields where {num_fields} belong"
            raise DataError(problem, file=file, row=number)
        if not row[0].isdigit():
            raise DataError(f"no id: {row[0]!r}", file=file, row=number, field="id")
    return rows


def _first(text: str | None, separator: str) -> str | None:
    return text.split(separator)[0] or None if text else None
