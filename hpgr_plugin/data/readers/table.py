"""Any parquet or csv with one event per row, by a map of its columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from hpgr_plugin.data.events import EventTable, SideTable, location, require
from hpgr_plugin.data.readers.assemble import (
    EventColumns,
    TimeUnit,
    concatenate,
    read_events,
    read_side_table,
)
from hpgr_plugin.data.readers.files import existing, matching


@dataclass(frozen=True, kw_only=True)
class TableReader:
    """Parquet (`.parquet`) or text with a header (anything else), one event per row.

    Args:
        path: a file, or a folder whose files all are read.
        files: patterns inside the folder; the first one that matches is used.
        user, item, timestamp: names of the columns.
        group: column of whole numbers: events shown together share a value.
        candidate: column of 0 and 1; 0: the event is only history.
        time_unit: "s" | "ms" | "us" | "ns", for timestamps that are plain numbers.
        delimiter: of text files.
        user_table, item_table: files with side features, ids under `user` and `item`.
        user_columns, item_columns: their columns.
        drop_bad_rows: drop and count bad rows instead of raising.
    """

    path: str = location("")
    files: tuple[str, ...] = ("*.parquet", "*.csv")
    user: str = "user_id"
    item: str = "item_id"
    timestamp: str = "timestamp"
    group: str | None = None
    candidate: str | None = None
    time_unit: TimeUnit = "s"
    delimiter: str = ","
    user_table: str | None = location()
    user_columns: tuple[str, ...] = ()
    item_table: str | None = location()
    item_columns: tuple[str, ...] = ()
    drop_bad_rows: bool = False

    def __post_init__(self) -> None:
        fits = self.time_unit in get_args(TimeUnit)
        require(fits, "TableReader.time_unit", "'s', 'ms', 'us' or 'ns'", self.time_unit)
        fits = len(self.delimiter) == 1 and self.delimiter.isascii()
        require(fits, "TableReader.delimiter", "one ASCII character", self.delimiter)

    def sources(self) -> list[Path]:
        """The events, and the tables of features."""
        tables = [existing(table) for table in (self.user_table, self.item_table) if table]
        return [*self._events(), *tables]

    def read(self, fields: Sequence[str]) -> EventTable:
        """The events, file after file."""
        events = concatenate([self._read(file, fields) for file in self._events()])
        return replace(
            events,
            user_features=self._side(self.user_table, self.user, self.user_columns),
            item_features=self._side(self.item_table, self.item, self.item_columns),
        )

    def _read(self, file: Path, fields: Sequence[str]) -> EventTable:
        columns = EventColumns(
            self.user, self.item, self.timestamp, self.group, self.candidate, self.time_unit
        )
        options = self._csv_options(file)
        return read_events(file, columns, fields, drop_bad_rows=self.drop_bad_rows, **options)

    def _events(self) -> list[Path]:
        return matching(existing(self.path), self.files)

    def _csv_options(self, file: Path) -> dict[str, Any]:
        return {} if file.suffix == ".parquet" else {"delimiter": self.delimiter}

    def _side(self, table: str | None, ids: str, columns: tuple[str, ...]) -> SideTable | None:
        return (
            read_side_table(table, ids, columns, **self._csv_options(Path(table)))
            if table
            else None
        )
