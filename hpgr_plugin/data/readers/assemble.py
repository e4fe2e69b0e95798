"""From a table with one event per row to an EventTable; and several of them put together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from hpgr_plugin.data.events import EventTable, SideTable
from hpgr_plugin.data.readers.checks import RowChecks, as_text, empty_to_null
from hpgr_plugin.data.readers.files import existing, read_table

TimeUnit = Literal["s", "ms", "us", "ns"]
Limits = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class EventColumns:
    """The names of a table's columns, and the unit of its timestamps where they are numbers."""

    user: str
    item: str
    timestamp: str
    group: str | None = None
    candidate: str | None = None
    time_unit: TimeUnit = "s"

    def with_fields(self, fields: Sequence[str]) -> list[str]:
        """Every column named, and the fields, each once."""
        named = (self.user, self.item, self.timestamp, self.group, self.candidate, *fields)
        return list(dict.fromkeys(name for name in named if name is not None))


def read_events(
    file: Path,
    columns: EventColumns,
    fields: Sequence[str],
    *,
    drop_bad_rows: bool,
    limits: Limits | None = None,
    **csv_options: Any,
) -> EventTable:
    """The events of a parquet or csv file; see check_events."""
    table, malformed = read_table(
        file, columns.with_fields(fields), drop_bad_rows=drop_bad_rows, **csv_options
    )
    checks = RowChecks(table, file, drop_bad_rows=drop_bad_rows, num_lost=malformed)
    return check_events(checks, columns, fields, limits)


def check_events(
    checks: RowChecks,
    columns: EventColumns,
    fields: Sequence[str],
    limits: Limits | None = None,
) -> EventTable:
    """The events of a table with one event per row.

    Args:
        checks: the table; rows marked bad already are left out too.
        columns: what its columns mean.
        fields: columns of numbers for labels and actions.
        limits: lowest and highest value by field, where the data set says so.

    Raises:
        DataError: a bad row, named.
    """
    users, items = checks.identifiers(columns.user), checks.identifiers(columns.item)
    times = checks.seconds(columns.timestamp, columns.time_unit)
    values = {field: checks.numbers(field, (limits or {}).get(field)) for field in fields}
    groups = None if columns.group is None else checks.whole_numbers(columns.group)
    candidates = (
        None if columns.candidate is None else checks.numbers(columns.candidate, (0, 1)) != 0
    )
    dropped = {checks.file.name: checks.num_bad}
    events = EventTable(users, items, times, values, candidates, groups, dropped=dropped)
    return events if checks.good.all() else events.take(checks.good)


def concatenate(parts: Sequence[EventTable]) -> EventTable:
    """The events of all parts, one after the other.

    Ids that are numbers in one part and text in another become text. Parts without a group
    get -1, parts without candidate flags are candidates.
    """
    dropped: Counter[str] = Counter()
    for part in parts:
        dropped.update(part.dropped)
    # An empty text file says nothing about the type of its ids.
    parts = [part for part in parts if len(part.timestamp)] or parts[:1]
    if len(parts) == 1:
        return replace(parts[0], dropped=dict(dropped))
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
        dropped=dict(dropped),
    )


def read_side_table(
    path: str | Path, id_column: str, columns: Sequence[str], **csv_options: Any
) -> SideTable:
    """The columns as text by id; a row without an id is an error."""
    file = existing(path)
    table, _ = read_table(file, [id_column, *columns], **csv_options)
    ids = RowChecks(table, file, drop_bad_rows=False).identifiers(id_column)
    return SideTable(ids, {name: empty_to_null(as_text(table[name])) for name in columns})


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
