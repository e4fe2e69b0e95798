"""Values to ids, numbers and seconds; a bad row is an error that names it, or is dropped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from hpgr_plugin.data.events import DataError

_UNITS_A_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
# The year 5138: nothing later is seconds, and milliseconds of any date since 1973 are later.
_LAST_SECOND = 10**11


class RowChecks:
    """Checks the columns of one table and remembers its bad rows.

    Args:
        table: the columns, in the order of the file.
        file: named in errors.
        drop_bad_rows: collect bad rows in `good` instead of raising at the first.
        file_rows: the 1-based row of the file of each row [E]; None: 1, 2, ...
    """

    def __init__(
        self,
        table: pa.Table,
        file: Path,
        *,
        drop_bad_rows: bool,
        file_rows: np.ndarray | None = None,
    ) -> None:
        self._table = table
        self._file = file
        self._file_rows = file_rows
        self._drop = drop_bad_rows
        self.good = np.ones(table.num_rows, dtype=bool)

    @property
    def num_bad(self) -> int:
        """Bad rows met so far."""
        return int((~self.good).sum())

    def identifiers(self, field: str) -> pa.Array:
        """Ids [E]: int64, or text."""
        column = _combined(self._table[field])
        if pa.types.is_integer(column.type):
            self._judge(field, pc.is_null(column), "no id")
            return pc.fill_null(column, 0).cast(pa.int64(), safe=False)
        if pa.types.is_floating(column.type):
            # Whole numbers that passed through a tool which knows no missing integer.
            numbers = column.to_numpy(zero_copy_only=False)
            bad = ~np.isfinite(numbers) | (numbers != np.floor(numbers))
            self._judge(field, bad, "no id")
            return pa.array(np.where(bad, 0, numbers).astype(np.int64))
        text = self._decoded(field, column)
        self._judge(field, pc.or_kleene(pc.is_null(text), pc.equal(text, "")), "no id")
        return pc.fill_null(text, "")

    def numbers(self, field: str) -> np.ndarray:
        """Numbers [E], float64."""
        values = _as_float(_combined(self._table[field]))
        self._judge(field, ~np.isfinite(values), "not a number")
        return values

    def whole_numbers(self, field: str) -> np.ndarray:
        """Whole numbers [E], int64."""
        column = _combined(self._table[field])
        if pa.types.is_integer(column.type) and column.null_count == 0:
            return column.to_numpy().astype(np.int64, copy=False)
        values = self.numbers(field)
        bad = np.isfinite(values) & (values != np.floor(values))
        self._judge(field, bad, "not a whole number")
        return np.where(np.isfinite(values) & ~bad, values, 0).astype(np.int64)

    def seconds(self, field: str, unit: str = "s") -> np.ndarray:
        """Times [E], int64 seconds since 1970; `unit` is that of plain numbers."""
        column = _combined(self._table[field])
        if pa.types.is_timestamp(column.type):
            unit = column.type.unit
            column = column.cast(pa.int64())
        if pa.types.is_integer(column.type) and column.null_count == 0:
            times = column.to_numpy().astype(np.int64, copy=False)
        else:
            values = _as_float(column)
            missing = ~np.isfinite(values)
            self._judge(field, missing, "not a time")
            times = np.where(missing, 0, np.floor(values)).astype(np.int64)
        self._judge(field, times < 0, "a negative time")
        if _UNITS_A_SECOND[unit] > 1:
            times = times // _UNITS_A_SECOND[unit]
        self._judge(field, times > _LAST_SECOND, "a time too late to be seconds")
        return times

    def _decoded(self, field: str, column: pa.Array) -> pa.Array:
        """Text; bytes that are not UTF-8 make a bad row."""
        if not pa.types.is_large_binary(column.type):
            return column.cast(pa.large_string())
        texts = [utf8_or_none(value) for value in column.to_pylist()]
        bad = np.array([text is None for text in texts], dtype=bool)
        self._judge(field, bad & column.is_valid().to_numpy(zero_copy_only=False), "not UTF-8")
        return pa.array(texts, pa.large_string())

    def _judge(self, field: str, bad: np.ndarray | pa.Array, problem: str) -> None:
        if isinstance(bad, (pa.Array, pa.ChunkedArray)):
            bad = bad.to_numpy(zero_copy_only=False).astype(bool)
        if not bad.any():
            return
        if not self._drop:
            first = int(bad.argmax())
            row = first + 1 if self._file_rows is None else int(self._file_rows[first])
            value = self._table[field][first].as_py()
            raise DataError(f"{problem}: {value!r}", file=self._file, row=row, field=field)
        self.good &= ~bad


def _combined(column: pa.ChunkedArray) -> pa.Array:
    """One array; text and bytes as their large kinds, which have no limit of 2 GiB."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind):
        kind = pa.large_string()
    elif pa.types.is_binary(kind):
        kind = pa.large_binary()
    elif pa.types.is_null(kind):
        kind = pa.float64()
    return column.cast(kind).combine_chunks()


def _as_float(column: pa.Array) -> np.ndarray:
    """float64 [E], NaN where there is no number."""
    if pa.types.is_boolean(column.type) or pa.types.is_integer(column.type):
        column = column.cast(pa.float64(), safe=False)
    if pa.types.is_floating(column.type):
        return column.to_numpy(zero_copy_only=False).astype(np.float64, copy=False)
    texts = pd.Series(column.to_pylist(), dtype=object)
    return pd.to_numeric(texts, errors="coerce").to_numpy(dtype=np.float64)


def utf8_or_none(value: bytes | None) -> str | None:
    """The text; None where the bytes are not UTF-8."""
    try:
        return None if value is None else value.decode("utf-8")
    except UnicodeDecodeError:
        return None
