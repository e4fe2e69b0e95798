"""Yambda: listens, likes and dislikes of a music service, in its flat parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as arrow_parquet

from hpgr_plugin.data.events import DataError, EventTable, location, require
from hpgr_plugin.data.readers.assemble import EventColumns, check_events, concatenate
from hpgr_plugin.data.readers.checks import RowChecks, as_text
from hpgr_plugin.data.readers.files import existing, read_parquet

# Event type -> its own file, where there is no multi_event.parquet.
FILES = {
    "listen": "listens.parquet",
    "like": "likes.parquet",
    "dislike": "dislikes.parquet",
    "unlike": "unlikes.parquet",
    "undislike": "undislikes.parquet",
}
FIELDS = ("played_ratio_pct", "action", "is_organic")
_ALL = "multi_event.parquet"
_TYPE = "event_type"
_HEARD = 50  # per cent of a track: what the data set's own benchmark counts as a listen


@dataclass(frozen=True, kw_only=True)
class YambdaReader:
    """Listens are ranked; likes and dislikes are history only.

    Fields for labels and actions: `played_ratio_pct` (above 100 where a track was wound back; 0 for
    what is no listen), `is_organic` (0: the service chose the track), and `action`: 0 a listen to
    less than half of the track, 1 to half or more, then 2 like, 3 dislike, 4 unlike, 5 undislike.

    Args:
        path: the folder of one flat size, such as `flat/50m`, with `multi_event.parquet`, or with
            `listens.parquet` and the other files of the types asked for.
        events: types to read: "listen", "like", "dislike", "unlike", "undislike".
        drop_bad_rows: drop and count bad rows instead of raising.
    """

    path: str = location("")
    events: tuple[str, ...] = ("listen", "like", "dislike")
    drop_bad_rows: bool = False

    def __post_init__(self) -> None:
        fits = set(self.events) <= set(FILES) and "listen" in self.events
        takes = f"'listen' and any others of {', '.join(FILES)}"
        require(fits, "YambdaReader.events", takes, self.events)

    def sources(self) -> list[Path]:
        """multi_event.parquet, or one file per type of event."""
        folder = existing(self.path)
        if folder.is_file():
            return [folder]
        if (folder / _ALL).is_file():
            return [folder / _ALL]
        return [existing(folder / FILES[event]) for event in self.events]

    def read(self, fields: Sequence[str]) -> EventTable:
        """The events, file after file."""
        for name in fields:
            if name not in FIELDS:
                raise DataError(f"Yambda has only the fields {', '.join(FIELDS)}", field=name)
        return concatenate([self._read(file, fields) for file in self.sources()])

    def _read(self, file: Path, fields: Sequence[str]) -> EventTable:
        names = arrow_parquet.read_schema(file).names
        optional = [name for name in ("played_ratio_pct", _TYPE) if name in names]
        table = read_parquet(file, ["uid", "item_id", "timestamp", "is_organic", *optional])
        checks = RowChecks(table, file, drop_bad_rows=self.drop_bad_rows)
        types = self._types(checks)
        kept = np.isin(types, self.events) | ~checks.good
        table = table.filter(pa.array(kept))
        listens = types[kept] == "listen"
        table = _with_ratio(table, listens)
        table = table.append_column("action", pa.array(_actions(table, types[kept])))
        table = table.append_column("is_listen", pa.array(listens.astype(np.int8)))
        inner = RowChecks(
            table,
            file,
            drop_bad_rows=self.drop_bad_rows,
            file_rows=np.flatnonzero(kept) + 1,
        )
        inner.good = checks.good[kept]
        columns = EventColumns("uid", "item_id", "timestamp", candidate="is_listen")
        return check_events(inner, columns, fields, {"is_organic": (0, 1)})

    def _types(self, checks: RowChecks) -> np.ndarray:
        """The type of every event [E]: the column's, or the one that the file is named by."""
        if _TYPE not in checks.table.column_names:
            by_file = {file: event for event, file in FILES.items()}
            event = by_file.get(checks.file.name)
            if event is None:
                problem = f"has no column {_TYPE!r} and is none of {', '.join(by_file)}"
                raise DataError(problem, file=checks.file)
            return np.full(checks.table.num_rows, event)
        texts = as_text(checks.table[_TYPE])
        known = pc.fill_null(pc.is_in(texts, value_set=pa.array(list(FILES), texts.type)), False)
        checks.judge(_TYPE, pc.invert(known), f"none of {', '.join(FILES)}")
        types: np.ndarray = np.array(pc.fill_null(texts, "").to_pylist(), dtype=np.str_)
        return types


def _with_ratio(table: pa.Table, listens: np.ndarray) -> pa.Table:
    """The table with a share played everywhere: 0 where there was nothing to play."""
    name = "played_ratio_pct"
    if name not in table.column_names:
        return table.append_column(name, pa.array(np.zeros(len(listens))))
    place = table.column_names.index(name)
    filled = pc.if_else(pa.array(listens), table[name].combine_chunks(), 0)
    return table.set_column(place, name, filled)


def _actions(table: pa.Table, types: np.ndarray) -> np.ndarray:
    """int8 [E], see YambdaReader; a listen without a share counts as not heard."""
    code = np.zeros(len(types), dtype=np.int8)
    for number, event in enumerate(FILES):
        code[types == event] = number + 1
    played = pc.fill_null(table["played_ratio_pct"].cast(pa.float64()), 0).to_numpy()
    code[(types == "listen") & ~(played >= _HEARD)] = 0
    return code
