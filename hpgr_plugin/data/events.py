"""What a reader returns: the source's events in columns, with the source's ids; and its error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from hpgr_plugin.errors import HpgrError

_LONGEST_PROBLEM = 600


class DataError(HpgrError):
    """A source that cannot be read: names the file, the 1-based data row and the field.

    The message is one line: control characters are escaped, and what is too long is cut.
    """

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
        if len(problem) > _LONGEST_PROBLEM:
            problem = f"{problem[: _LONGEST_PROBLEM - 100]} ... {problem[-95:]}"
        message = f"{', '.join(where)}: {problem}" if where else problem
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))
        self.file = file
        self.row = row
        self.field = field


def require(fits: bool, binding: str, takes: str, value: object) -> None:
    """Checks one argument.

    Args:
        fits: whether it is usable.
        binding: its name in gin, without `hpgr.`.
        takes: what it takes.
        value: what it got.

    Raises:
        HpgrError: it is not usable.
    """
    if not fits:
        raise HpgrError(f"hpgr.{binding} takes {takes}, got {value!r}")


def require_fields(settings: object, least: int, *names: str) -> None:
    """Checks that fields of a settings class are finite numbers of `least` or more."""
    for name in names:
        value = getattr(settings, name)
        fits = least <= value < math.inf
        require(fits, f"{type(settings).__name__}.{name}", f"{least} or more", value)


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
        candidate: bool [E]; False: the event is only history. None: all True.
        group: int64 [E]; events shown together share a value. None: unknown.
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

    def take(self, kept: np.ndarray) -> EventTable:
        """The events where `kept`, bool [E]; side features and counts stay."""
        return replace(
            self,
            user=self.user.filter(pa.array(kept)),
            item=self.item.filter(pa.array(kept)),
            timestamp=self.timestamp[kept],
            values={name: value[kept] for name, value in self.values.items()},
            candidate=None if self.candidate is None else self.candidate[kept],
            group=None if self.group is None else self.group[kept],
        )


class Reader(Protocol):
    """What prepare_data reads from; a frozen dataclass, so that its settings key the cache."""

    def sources(self) -> list[Path]:
        """The files read, which together with the settings key the cache."""
        ...

    def read(self, fields: Sequence[str]) -> EventTable:
        """The events, with `values` holding at least these fields."""
        ...


def location(default: Any = None) -> Any:
    """A field of a reader that holds a path, which is not part of the cache key."""
    return field(default=default, metadata={"location": True})
