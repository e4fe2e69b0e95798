"""Files to arrow tables: csv and its kin, and parquet. Nothing is judged here but the shape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as arrow_csv
import pyarrow.parquet as arrow_parquet

from hpgr_plugin.data.events import DataError


def existing(path: str | Path) -> Path:
    """The path, or an error that says it is not there."""
    found = Path(path).expanduser()
    if not found.exists():
        raise DataError("no such file or folder", file=path)
    return found


def matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files of a folder (or the file itself) under the first pattern that finds any."""
    if folder.is_file():
        return [folder]
    for pattern in patterns:
        if found := sorted(folder.glob(pattern)):
            return found
    raise DataError(f"holds none of {', '.join(patterns)}", file=folder)


def read_table(
    path: Path, columns: Sequence[str], *, drop_bad_rows: bool = False, **csv_options: Any
) -> tuple[pa.Table, int]:
    """The named columns of a parquet or csv file, and the number of malformed rows left out."""
    if path.suffix == ".parquet":
        return read_parquet(path, columns), 0
    return read_csv(path, columns, drop_bad_rows=drop_bad_rows, **csv_options)


def read_parquet(path: Path, columns: Sequence[str]) -> pa.Table:
    """The named columns of a parquet file.

    Raises:
        DataError: a column is missing, or the file is no parquet.
    """
    try:
        # One thread: memory stays near the size of the columns.
        with arrow_parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names, columns)
            return file.read(columns=list(columns), use_threads=False)
    except pa.ArrowInvalid as error:
        raise DataError(f"cannot be read as parquet ({error})", file=path) from error


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
    """The named columns of a text table, and the number of malformed rows left out.

    Args:
        path: the file.
        columns: the columns wanted.
        drop_bad_rows: leave out rows with another number of fields instead of raising.
        delimiter: one character.
        header: the names of the columns where the first line is data already.
        typed_header: the first line holds `name:type`.
        quoted: fields may stand in double quotes.

    Raises:
        DataError: a column is missing, or a row has another number of fields.
    """
    names = list(header) if header else _first_line(path, delimiter, typed_header)
    _check_columns(path, names, columns)
    malformed: list[tuple[int, int]] = []

    def on_malformed(row: Any) -> str:
        malformed.append((row.number - (0 if header else 1), row.actual_columns))
        return "skip"

    table = arrow_csv.read_csv(
        path,
        # One thread: only then does a malformed row know its number.
        read_options=arrow_csv.ReadOptions(
            use_threads=False, column_names=names, skip_rows=0 if header else 1
        ),
        parse_options=arrow_csv.ParseOptions(
            delimiter=delimiter,
            quote_char='"' if quoted else False,
            invalid_row_handler=on_malformed,
        ),
        convert_options=arrow_csv.ConvertOptions(include_columns=list(columns)),
    )
    if malformed and not drop_bad_rows:
        row, found = malformed[0]
        raise DataError(f"{found} fields where {len(names)} belong", file=path, row=row)
    return table, len(malformed)


def _first_line(path: Path, delimiter: str, typed: bool) -> list[str]:
    with path.open("rb") as file:
        line = file.readline().decode("utf-8-sig", errors="replace").rstrip("\r\n")
    names = [name.strip().strip('"') for name in line.split(delimiter)]
    return [name.partition(":")[0] for name in names] if typed else names


def _check_columns(path: Path, present: Sequence[str], wanted: Sequence[str]) -> None:
    for column in wanted:
        if column not in present:
            raise DataError(
                f"missing column; the file has {', '.join(present)}", file=path, field=column
            )
