"""From a table of one event a row to an EventTable; and several of them put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hpgr_plugin.data.events import DataError, EventTable, SideTable
from hpgr_plugin.data.readers.checks import RowChecks, utf8_or_none
from hpgr_plugin.data.readers.files import existing, read_table


@dataclass(frozen=True)
class EventColumns:
    """The names of a table's columns."""

    user: str
    item: str
    timestamp: str
    group: str | None = None
    candidate: str | None = None

    def with_fields(self, fields: Sequence[str]) -> list[str]:
        """Every column named, and the fields, each once."""
        named = (self.user, self.item, self.timestamp, self.group, self.candidate, *fields)
        return list(dict.fromkeys(name for name in named if name is not None))


def check_events(
    table: pa.Table,
    file: Path,
    columns: EventColumns,
    *,
    fields: Sequence[str],
    time_unit: str = "s",
    drop_bad_rows: bool = False,
    malformed: int = 0,
    file_rows: np.ndarray | None = None,
) -> EventTable:
    """The events of a table.

    Args:
        table: one event a row.
        file: where it comes from.
        columns: what its columns mean.
        fields: columns of numbers for labels and actions.
        time_unit: "s" | "ms" | "us" | "ns", where timestamps are plain numbers.
        drop_bad_rows: drop and count bad rows instead of raising.
        malformed: bad rows that the file lost before.
        file_rows: the 1-based row of the file of each row, where these differ.

    Raises:
        DataError: a bad row, named.
    """
    checks = RowChecks(table, file, drop_bad_rows=drop_bad_rows, file_rows=file_rows)
    users, items = checks.identifiers(columns.user), checks.identifiers(columns.item)
    times = checks.seconds(columns.timestamp, time_unit)
    values = {field: checks.numbers(field) for field in fields}
    groups = None if columns.group is None else checks.whole_numbers(columns.group)
    candidates = None if columns.candidate is None else checks.numbers(columns.candidate) != 0
    good = checks.good
    if not good.all():
        users, items = users.filter(pa.array(good)), items.filter(pa.array(good))
        times = times[good]
        values = {field: value[good] for field, value in values.items()}
        groups = None if groups is None else groups[good]
        candidates = None if candidates is None else candidates[good]
    return EventTable(
        user=users,
        item=items,
        timestamp=times,
        values=values,
        candidate=candidates,
        group=groups,
        dropped={file.name: malformed + checks.num_bad},
    )


def concatenate(parts: Sequence[EventTable]) -> EventTable:
    """The events of all parts, one after the other.

    Ids that are numbers in one part and text in another become text. Parts without a group
    get -1, parts without candidate flags are candidates.
    """
    if len(parts) == 1:
        return parts[0]
    if not parts:
        raise DataError("no file to read")
    dropped: dict[str, int] = {}
    for part in parts:
        for file, count in part.dropped.items():
            dropped[file] = dropped.get(file, 0) + count
    return EventTable(
        user=_joined([part.user for part in parts]),
        item=_joined([part.item for part in parts]),
        timestamp=np.concatenate([part.timestamp for part in parts]),
        values={
            field: np.concatenate([part.values[field] for part in parts])
            for field in parts[0].values
        },
        candidate=_optional([part.candidate for part in parts], parts, True),
        group=_optional([part.group for part in parts], parts, -1),
        dropped=dropped,
    )


def _joined(arrays: list[pa.Array]) -> pa.Array:
    kinds = {array.type for array in arrays}
    if len(kinds) > 1:
        arrays = [array.cast(pa.large_string()) for array in arrays]
    return pa.concat_arrays(arrays)


def _optional(
    arrays: list[np.ndarray | None], parts: Sequence[EventTable], missing: bool | int
) -> np.ndarray | None:
    if all(array is None for array in arrays):
        return None
    return np.concatenate(
        [
            np.full(len(part.timestamp), missing) if array is None else array
            for array, part in zip(arrays, parts, strict=True)
        ]
    )


def read_side_table(
    path: str | Path, id_column: str, columns: Sequence[str], **csv_options: Any
) -> SideTable:
    """The columns as text by id; a row without an id is an error."""
    file = existing(path)
    table, _ = read_table(file, [id_column, *columns], **csv_options)
    ids = RowChecks(table, file, drop_bad_rows=False).identifiers(id_column)
    return SideTable(ids, {name: as_text(table[name]) for name in columns})


def as_text(column: pa.ChunkedArray) -> pa.Array:
    """Any column as text; null stays null, and bytes that are not UTF-8 become null."""
    if pa.types.is_binary(column.type):
        return pa.array([utf8_or_none(value) for value in column.to_pylist()], pa.string())
    return column.cast(pa.string()).combine_chunks()
