"""The one error a person meets when the data on disk is not what a reader takes."""

from __future__ import annotations

from pathlib import Path


class DataError(ValueError):
    """A source that cannot be read: names the file, the 1-based data row and the field."""

    def __init__(
        self,
        problem: str,
        *,
        file: str | Path | None = None,
        row: int | None = None,
        field: str | None = None,
    ) -> None:
        where = [str(file)] if file is not None else []
        where += [f"row {row}"] if row is not None else []
        where += [f"field {field!r}"] if field is not None else []
        super().__init__(f"{', '.join(where)}: {problem}" if where else problem)
        self.file = file
        self.row = row
        self.field = field
