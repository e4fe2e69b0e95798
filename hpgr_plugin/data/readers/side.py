"""Side features of users and items from a table with one row each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from hpgr_plugin.data.events import SideTable
from hpgr_plugin.data.readers.checks import RowChecks, utf8_or_none
from hpgr_plugin.data.readers.files import existing, read_table


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
