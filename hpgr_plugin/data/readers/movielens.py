"""MovieLens: `ratings.dat` (1M, 10M), `ratings.csv` (20M and later), `u.data` and `.inter`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from hpgr_plugin.data.events import DataError, EventTable, SideTable, location
from hpgr_plugin.data.readers.assemble import EventColumns, read_events, read_side_table
from hpgr_plugin.data.readers.files import existing, matching

_LIMITS = {"rating": (0.5, 5.0)}
_PATTERNS = ("*.inter", "ratings.dat", "ratings.csv", "u.data")
_YEAR = r"\((?P<year>\d{4})\)\s*$"
_INTER = {"delimiter": "\t", "typed_header": True, "quoted": False}
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
        events = read_events(
            file, columns, fields, drop_bad_rows=self.drop_bad_rows, limits=_LIMITS, **options
        )
        users, items = _features(file) if self.features else (None, None)
        return replace(events, user_features=users, item_features=items)

    def _ratings(self) -> Path:
        return matching(existing(self.path), _PATTERNS)[0]


def _layout(file: Path) -> tuple[EventColumns, dict[str, Any]]:
    """The names of the columns, and how to read the file."""
    names = EventColumns("user_id", "item_id", "timestamp")
    if file.suffix == ".inter":
        return names, _INTER
    if file.suffix == ".dat":
        # Fields are separated by "::", which a one-character delimiter sees as an empty column.
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
    """Gender, age and occupation of users (not in .csv); year and first genre of movies."""
    files = _feature_files(ratings)
    if ratings.suffix == ".inter":
        users = read_side_table(files[0], "user_id", ["age", "gender", "occupation"], **_INTER)
        users.columns["age"] = _bracketed(users.columns["age"])
        movies = read_side_table(files[1], "item_id", ["release_year", "class"], **_INTER)
        years, genres = movies.columns.values()
        return users, SideTable(movies.ids, {"year": years, "genre": _first(genres, " ")})
    if ratings.suffix == ".dat":
        users = _dat_table(files[0], ["gender", "age", "occupation", "zip"])
        return users, _titled_movies(_dat_table(files[1], ["title", "genres"]))
    if ratings.suffix == ".csv":
        return None, _titled_movies(read_side_table(files[0], "movieId", ["title", "genres"]))
    raise DataError("this format has no features here; set features=False", file=ratings)


def _bracketed(ages: pa.Array) -> pa.Array:
    """Years of age in the brackets that MovieLens-1M uses."""
    years = [int(age) if age and age.isdigit() else None for age in ages.to_pylist()]
    brackets = [
        None if year is None else str(sum(year >= limit for limit in _AGE_BRACKETS))
        for year in years
    ]
    return pa.array(brackets, pa.string())


def _titled_movies(movies: SideTable) -> SideTable:
    """Year and first genre from titles that end in (year) and genre|genre."""
    year = pc.struct_field(pc.extract_regex(movies.columns["title"], _YEAR), "year")
    return SideTable(movies.ids, {"year": year, "genre": _first(movies.columns["genres"], "|")})


def _dat_table(file: Path, columns: list[str]) -> SideTable:
    """A table of fields separated by "::", id first; movie titles in these files are Latin-1."""
    rows = [line.split("::") for line in file.read_text(encoding="latin-1").splitlines() if line]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(columns) + 1:
            problem = f"{len(row)} fields, expected {len(columns) + 1}"
            raise DataError(problem, file=file, row=number)
        if not row[0].isdigit():
            raise DataError(f"no id: {row[0]!r}", file=file, row=number, field="id")
    ids = pa.array([int(row[0]) for row in rows], pa.int64())
    texts = {
        name: pa.array([row[place] for row in rows], pa.string())
        for place, name in enumerate(columns, start=1)
        if name != "zip"
    }
    return SideTable(ids, texts)


def _first(texts: pa.Array, separator: str) -> pa.Array:
    """The part of each text before the separator; null where there is none."""
    firsts = [text.split(separator)[0] or None if text else None for text in texts.to_pylist()]
    return pa.array(firsts, pa.string())
