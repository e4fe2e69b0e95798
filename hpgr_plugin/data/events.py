"""What a reader returns: the source's events in columns, with the source's ids; and its error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa


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


@dataclass(frozen=True)
class SideTable:
    """Side features of users or items, before coding.

    Attributes:
        ids: [R] user or item ids, of the same kind as in the events.
        columns: name -> [R] values, as text; null where the source says nothing.
    """

    ids: pa.Array
    columns: dict[str, pa.Array]


@dataclass(frozen=True)
class EventTable:
    """E events in the order of the source.

    Attributes:
        user, item: [E] integers or text.
        timestamp: int64 [E] seconds.
        values: the fields that labels and actions are made of, [E] each.
        candidate: bool [E]; False marks an event that is only ever history. None: all True.
        group: int64 [E]; events shown together share a value. None: no such thing.
        dropped: file name -> number of bad rows left out.
    """

    user: pa.Array
    item: pa.Array
    timestamp: np.ndarray
    values: dict[str, np.ndarray]
    candidate: np.ndarray | None = None
    group: np.ndarray | None = None
    user_features: SideTable | None = None
    item_features: SideTable | None = None
    dropped: dict[str, int] = field(default_factory=dict)


class Reader(Protocol):
    """Anything prepare_data can read from; a frozen dataclass, so that it has settings."""

    def sources(self) -> list[Path]:
        """The files read, which together with the settings key the cache."""
        ...

    def read(self, fields: Sequence[str]) -> EventTable:
        """The events, with `values` holding at least these fields."""
        ...


def location(default: Any = None) -> Any:
    """A reader's argument that says where the data lies: no part of its settings."""
    return field(default=default, metadata={"location": True})
