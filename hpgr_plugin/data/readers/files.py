"""Files to arrow tables: parquet, and csv and similar text. Checks the shape, not the values."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as arrow_csv
import pyarrow.parquet as arrow_parquet

from hpgr_plugin.data.events import DataError

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"PAR1": "parquet",
}
_MAX_HEADER_BYTES = 1 << 20
_MALFORMED = re.compile(r"Row #(\d+): Expected (\d+) columns, got (\d+)")


def existing(path: str | Path) -> Path:
    """The path.

    Raises:
        DataError: nothing is there.
    """
    if not str(path):
        raise DataError("a reader's `path` takes a file or folder, got ''")
    found = Path(path).expanduser()
    if not found.exists():
        raise DataError("no such file or folder", file=path)
    return found


def matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files of a folder (or the file itself) under the first pattern that finds any."""
    if folder.is_file():
        return [folder]
    for pattern in patterns:
        if found := sorted(path for path in folder.glob(pattern) if path.is_file()):
            return found
    raise DataError(f"holds none of {', '.join(patterns)}", file=folder)


def read_table(
    path: Path, columns: Sequence[str], *, drop_bad_rows: bool = False, **csv_options: Any
) -> tuple[pa.Table, int]:
    """The named columns of a parquet or csv file, and the number of malformed rows left out."""
    if path.suffix == ".parquet":
        return read_parquet(path, columns), 0
    return read_csv(path, columns, drop_bad_rows=drop_bad_rows, **csv_options)


def parquet_columns(path: Path) -> list[str]:
    """The names of a parquet file's columns."""
    with _named_failure(path, "parquet"):
        return arrow_parquet.read_schema(path).names


def read_parquet(path: Path, columns: Sequence[str], lists: Sequence[str] = ()) -> pa.Table:
    """The named columns of a parquet file, of which `lists` hold lists and the others values.

    Raises:
        DataError: a column is missing, there twice or of another kind, or it is not parquet.
    """
    # One thread: memory stays near the size of the columns.
    with _named_failure(path, "parquet"), arrow_parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        _check_columns(path, schema.names, [*columns, *lists])
        for name in columns:
            if pa.types.is_nested(schema.field(name).type):
                problem = f"takes one value per row, got {schema.field(name).type}"
                raise DataError(problem, file=path, field=name)
        for name in lists:
            if not isinstance(schema.field(name).type, (pa.ListType, pa.LargeListType)):
                problem = f"takes a list per row, got {schema.field(name).type}"
                raise DataError(problem, file=path, field=name)
        return file.read(columns=[*columns, *lists], use_threads=False)


def read_csv(
    path: Path,
    columns: Sequence[str],
    *,
    drop_bad_rows: bool = False,
    delimiter: str = ",",
    header: Sequence[str] | None = None,
    typed_header: bool = False,
    quoted: bool = True,
) -> tuple[pa.Table, int]:
    """The named columns of a text table as bytes, and the number of malformed rows left out.

    Args:
        path: the file.
        columns: the columns wanted.
        drop_bad_rows: leave out rows with another number of fields instead of raising.
        delimiter: one character.
        header: the names of the columns where the first line is data already.
        typed_header: the first line holds `name:type`.
        quoted: fields may stand in double quotes.

    Raises:
        DataError: a column is missing or there twice, a row has another number of fields, or
            the file is not text.
    """
    first_line = _first_line(path)
    if header is None:
        names = [name.strip().strip('"') for name in first_line.split(delimiter)]
        header = [name.partition(":")[0] for name in names] if typed_header else names
        skipped = 1
    else:
        skipped = 0
    _check_columns(path, header, columns)
    num_malformed = 0

    def skip(_: Any) -> str:
        nonlocal num_malformed
        num_malformed += 1
        return "skip"

    with _named_failure(path, "text", skipped), _quiet_handler():
        table = arrow_csv.read_csv(
            path,
            # One thread: only then does a malformed row know its number.
            read_options=arrow_csv.ReadOptions(
                use_threads=False, column_names=header, skip_rows=skipped
            ),
            parse_options=arrow_csv.ParseOptions(
                delimiter=delimiter,
                quote_char='"' if quoted else False,
                invalid_row_handler=skip if drop_bad_rows else None,
            ),
            # Bytes: a type guessed from the first rows would change ids and fail in later rows.
            convert_options=arrow_csv.ConvertOptions(
                include_columns=list(columns),
                column_types={name: pa.large_binary() for name in columns},
            ),
        )
    return table, num_malformed


@contextmanager
def _quiet_handler() -> Iterator[None]:
    """Arrow prints a traceback where a malformed row is not UTF-8, and then fails by itself."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = hook


@contextmanager
def _named_failure(path: Path, kind: str, header_lines: int = 0) -> Iterator[None]:
    """What the library cannot read becomes one line that names the file, and the row if known."""
    try:
        yield
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        if found := _MALFORMED.search(str(error)):
            row, expected, got = map(int, found.groups())
            problem = f"{got} fields, expected {expected}"
            raise DataError(problem, file=path, row=row - header_lines) from error
        raise DataError(f"cannot be read as {kind} ({error})", file=path) from error


def _first_line(path: Path) -> str:
    """The first line of a file of text."""
    with _named_failure(path, "text"), path.open("rb") as file:
        start = file.read(_MAX_HEADER_BYTES)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(f"takes text, got {name}: unpack it or rename it", file=path)
    if b"\0" in start:
        raise DataError("takes text, got binary data or UTF-16", file=path)
    line = start.split(b"\n", 1)[0]
    if len(line) == _MAX_HEADER_BYTES:
        raise DataError(f"the first line is longer than {_MAX_HEADER_BYTES} bytes", file=path)
    return line.decode("utf-8-sig", errors="replace").rstrip("\r")


def _check_columns(path: Path, present: Sequence[str], wanted: Sequence[str]) -> None:
    for column in wanted:
        if (times := present.count(column)) != 1:
            problem = "missing column" if not times else f"{times} columns of this name"
            problem += f"; the file has {', '.join(present) or 'no header line'}"
            raise DataError(problem, file=path, field=column)
