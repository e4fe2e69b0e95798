"""Values to ids, numbers and seconds; a bad row is an error that names it, or is dropped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from hpgr_plugin.data.events import DataError

_UNITS_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
# The year 5138: nothing later is seconds, and milliseconds of any date since 1973 are later.
_LAST_SECOND = 10**11
_WHOLE = r"^(0|-?[1-9][0-9]*)$"
# Leading zeros make a text, not a number.
_NUMBER = r"^[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_MISSING = r"^(?i:nan|null|none|n/a|na)$"
_TRUTHS = {"true": 1, "True": 1, "TRUE": 1, "false": 0, "False": 0, "FALSE": 0}
_LONGEST_ID = 1024
# Below two to this power, every whole number is a float of its own.
_EXACT_BITS = {pa.float16(): 11, pa.float32(): 24, pa.float64(): 53}


class RowChecks:
    """Checks the columns of one table and remembers its bad rows.

    Args:
        table: the columns, in the order of the file.
        file: named in errors.
        drop_bad_rows: collect bad rows in `good` instead of raising at the first.
        file_rows: the 1-based row of the file of each row [E]; None: 1, 2, ...
        num_lost: bad rows that are not in the table any more.

    Attributes:
        good: bool [E]; False marks a bad row.
    """

    def __init__(
        self,
        table: pa.Table,
        file: Path,
        *,
        drop_bad_rows: bool,
        file_rows: np.ndarray | None = None,
        num_lost: int = 0,
    ) -> None:
        self.table = table
        self.file = file
        self._file_rows = file_rows
        self._drop = drop_bad_rows
        self._num_lost = num_lost
        self.good = np.ones(table.num_rows, dtype=bool)

    @property
    def num_bad(self) -> int:
        """Bad rows found so far, and those lost before."""
        return self._num_lost + int((~self.good).sum())

    def identifiers(self, field: str) -> pa.Array:
        """Ids [E], exactly: int64, uint64 where that is too narrow, or text."""
        column = self._column(field)
        if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
            return self._text_ids(field, column)
        self.judge(field, pc.is_null(column), "no id")
        column = pc.fill_null(column, 0)
        if pa.types.is_integer(column.type):
            return _first_cast(column, pa.int64(), pa.uint64())
        ids, problems = _float_ids(column)
        for problem, bad in problems.items():
            self.judge(field, bad, problem)
        return ids

    def numbers(self, field: str, limits: tuple[float, float] | None = None) -> np.ndarray:
        """Numbers [E], float64; outside of `limits` (lowest, highest) a row is bad."""
        column = self._column(field)
        if _is_text(column.type):
            column = _parsed(_trimmed(column))
        try:
            values = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        except pa.ArrowException as error:
            problem = f"takes numbers, got {column.type}"
            raise DataError(problem, file=self.file, field=field) from error
        self.judge(field, ~np.isfinite(values), "not a number")
        if limits is not None:
            outside = (values < limits[0]) | (values > limits[1])
            self.judge(field, outside, f"outside of {limits[0]:g} to {limits[1]:g}")
        return values

    def whole_numbers(self, field: str) -> np.ndarray:
        """Whole numbers [E], int64, exactly."""
        numbers = self.identifiers(field)
        if not len(numbers):
            return np.zeros(0, dtype=np.int64)
        if numbers.type != pa.int64():
            problem = f"takes whole numbers of 64 bits, got {numbers.type}"
            raise DataError(problem, file=self.file, field=field)
        return numbers.to_numpy()

    def seconds(self, field: str, unit: str = "s") -> np.ndarray:
        """Times [E], int64 seconds since 1970; `unit` is that of plain numbers."""
        column = self._column(field)
        if _is_text(column.type):
            kinds = (pa.int64(), pa.timestamp("us"), pa.timestamp("us", "UTC"))
            column = _first_cast(_trimmed(column), *kinds)
            column = _parsed(column) if _is_text(column.type) else column
        if pa.types.is_timestamp(column.type):
            unit = column.type.unit
            column = column.cast(pa.int64())
        if pa.types.is_floating(column.type):
            values = column.to_numpy(zero_copy_only=False).astype(np.float64)
            missing = ~(abs(values) < 2.0**63)
            times = np.floor(np.where(missing, 0, values)).astype(np.int64)
        elif pa.types.is_integer(column.type):
            missing = pc.is_null(column)
            times = pc.fill_null(column, 0).cast(pa.int64(), safe=False).to_numpy()
        else:
            raise DataError(f"takes times, got {column.type}", file=self.file, field=field)
        self.judge(field, missing, "not a time")
        self.judge(field, times < 0, "a negative time")
        if _UNITS_PER_SECOND[unit] > 1:
            times = times // _UNITS_PER_SECOND[unit]
        self.judge(field, times > _LAST_SECOND, "a time too late to be seconds")
        return times

    def judge(self, field: str, bad: np.ndarray | pa.Array, problem: str) -> None:
        """Marks the rows where `bad` [E], or raises at the first of them.

        Raises:
            DataError: there is one, and bad rows are not dropped.
        """
        if isinstance(bad, pa.Array):
            bad = _as_mask(bad)
        if not bad.any():
            return
        if not self._drop:
            first = int(bad.argmax())
            row = first + 1 if self._file_rows is None else int(self._file_rows[first])
            shown = _shown(_python_value(self.table[field][first]))
            raise DataError(f"{problem}: {shown}", file=self.file, row=row, field=field)
        self.good &= ~bad

    def _column(self, field: str) -> pa.Array:
        """One array; text and bytes as their large kinds, which have no limit of 2 GiB."""
        column = self.table[field]
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

    def _text_ids(self, field: str, column: pa.Array) -> pa.Array:
        """The texts; as whole numbers where a file without types holds only such."""
        texts = as_text(column)
        if texts.null_count > column.null_count:
            self.judge(field, pc.and_(pc.is_null(texts), pc.is_valid(column)), "not UTF-8")
        encoded = empty_to_null(texts).dictionary_encode()
        place = pc.fill_null(encoded.indices, -1).to_numpy()
        ids, problems = encoded.dictionary, _unfit_ids(encoded.dictionary)
        if self.file.suffix != ".parquet" and not any(bad.any() for bad in problems.values()):
            ids, problems = _ids_of_texts(ids)
        self.judge(field, place < 0, "no id")
        for problem, bad in problems.items():
            self.judge(field, np.append(bad, False)[place], problem)
        # A place for the rows without an id, which are dropped.
        return pa.concat_arrays([ids, pa.array([0]).cast(ids.type)]).take(
            pa.array(np.where(place < 0, len(ids), place))
        )


def as_text(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Any column as text; null stays null, and bytes that are not UTF-8 become null."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    try:
        return column.cast(pa.large_string())
    except pa.ArrowInvalid:
        return pa.array([_utf8_or_none(value) for value in column.to_pylist()], pa.large_string())


def empty_to_null(texts: pa.Array) -> pa.Array:
    """The texts, null where they are empty."""
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, texts.type), texts)


def _python_value(value: pa.Scalar) -> object:
    """The value; of a time that `datetime` cannot hold, its number."""
    try:
        return value.as_py()
    except (OverflowError, ValueError):
        return value.cast(pa.int64()).as_py()


def _shown(value: object) -> str:
    """The value for a message: bytes as text where they are, long ones cut."""
    if isinstance(value, bytes):
        value = _utf8_or_none(value) or value
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:80]}... ({len(shown)} characters)"


def _utf8_or_none(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_large_string(kind) or pa.types.is_large_binary(kind)


def _first_cast(column: pa.Array, *kinds: pa.DataType) -> pa.Array:
    """The column as the first of the types that holds all of it; as it is where none does."""
    for kind in kinds:
        try:
            return column.cast(kind)
        except pa.ArrowInvalid:
            continue
    return column


def _unfit_ids(texts: pa.Array) -> dict[str, np.ndarray]:
    """By problem, which of the texts [N] cannot be stored as ids."""
    long = pc.greater(pc.utf8_length(texts), _LONGEST_ID)
    return {
        "an id with a NUL character": _as_mask(pc.match_substring(texts, "\0")),
        f"an id of more than {_LONGEST_ID} characters": _as_mask(long),
    }


def _as_mask(values: pa.Array) -> np.ndarray:
    return values.to_numpy(zero_copy_only=False).astype(bool)


def _ids_of_texts(texts: pa.Array) -> tuple[pa.Array, dict[str, np.ndarray]]:
    """Ids [N] of distinct texts [N], and by problem which of the texts are bad."""

    def match(pattern: str) -> np.ndarray:
        return _as_mask(pc.match_substring_regex(trimmed, pattern))

    trimmed = pc.utf8_trim_whitespace(texts)
    missing = match(_MISSING)
    if not (match(_NUMBER) | missing).all() or missing.all():
        return texts, {}
    trimmed = pc.if_else(pa.array(missing), "0", trimmed)
    problems: dict[str, np.ndarray] = {}
    if match(_WHOLE).all():
        ids = _first_cast(trimmed, pa.int64(), pa.uint64())
    else:
        ids, problems = _float_ids(_parsed(trimmed))
    problems["no id"] = problems.get("no id", missing) | missing
    bad = np.any(list(problems.values()), axis=0)
    again = np.zeros(len(ids), dtype=bool)
    again[~bad] = ids.filter(pa.array(~bad)).to_pandas().duplicated()
    problems["an id that other rows write differently"] = again
    return ids, problems


def _float_ids(column: pa.Array) -> tuple[pa.Array, dict[str, np.ndarray]]:
    """int64 ids [E] of floats that stand for whole numbers, and by problem which are bad."""
    numbers = column.to_numpy(zero_copy_only=False).astype(np.float64)
    bad = ~np.isfinite(numbers) | (numbers != np.floor(numbers))
    inexact = ~bad & (abs(numbers) >= 2.0 ** _EXACT_BITS[column.type])
    ids = pa.array(np.where(bad | inexact, 0, numbers).astype(np.int64))
    return ids, {"no id": bad, f"an id that {column.type} may not hold exactly": inexact}


def _trimmed(column: pa.Array) -> pa.Array:
    """Text without surrounding blanks; null where nothing is left or it is not UTF-8."""
    return empty_to_null(pc.utf8_trim_whitespace(as_text(column)))


def _parsed(texts: pa.Array) -> pa.Array:
    """float64 [E] from text; null or NaN where it is no number."""
    try:
        return texts.cast(pa.float64())
    except pa.ArrowInvalid:
        words = pd.Series(texts.to_pylist(), dtype=object)
        numbers = pd.to_numeric(words, errors="coerce").astype(np.float64)
        return pa.array(numbers.fillna(words.map(_TRUTHS)).to_numpy(dtype=np.float64))
