"""KuaiRand: exposures of short videos, in its own csv columns or in parquet with the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hpgr_plugin.data.events import EventTable, SideTable, location, require
from hpgr_plugin.data.readers.assemble import (
    EventColumns,
    concatenate,
    read_events,
    read_side_table,
)
from hpgr_plugin.data.readers.files import existing, matching

_STANDARD_LOGS = ("log_standard*.csv", "log_standard*.parquet", "log*.parquet", "log*.csv")
_DAY = "date"
# Some extracts carry the columns of a video in the log itself.
_VIDEO_FILES = ("video_features_basic*.csv", "video_features_basic*.parquet", "log*.parquet")


@dataclass(frozen=True, kw_only=True)
class KuaiRandReader:
    """Exposures with `is_click`, `is_like`, `long_view`, `tab` ... as fields for labels.

    is_click is a click in the two-column view and a valid play in the single-column one; the
    field `tab` tells which. Duplicated rows of the source are kept.

    Args:
        path: the folder, or one log file.
        logs: patterns of log files; the first one that matches is used. The random-exposure log
            (`log_random*`) is not among the default.
        user_columns: columns of `user_features*.csv` to read as features of users.
        video_columns: columns of `video_features_basic*` (or of the log) for items.
        first_day, last_day: leave out exposures of other days, written as in the column `date`:
            20220425. None: no limit.
        drop_bad_rows: drop and count bad rows instead of raising.
    """

    path: str = location("")
    logs: tuple[str, ...] = _STANDARD_LOGS
    user_columns: tuple[str, ...] = ()
    video_columns: tuple[str, ...] = ()
    first_day: int | None = None
    last_day: int | None = None
    drop_bad_rows: bool = False

    def __post_init__(self) -> None:
        for name in ("first_day", "last_day"):
            day = getattr(self, name)
            fits = day is None or 19700101 <= day <= 99991231
            require(fits, f"KuaiRandReader.{name}", "None or a day such as 20220425", day)

    def sources(self) -> list[Path]:
        """The logs, and the files of features where they are read."""
        return [*self._logs(), *self._user_files(), *self._video_files()]

    def read(self, fields: Sequence[str]) -> EventTable:
        """The exposures, file after file."""
        events = concatenate([self._read_log(file, fields) for file in self._logs()])
        return replace(
            events,
            user_features=_side(self._user_files(), "user_id", self.user_columns),
            item_features=_side(self._video_files(), "video_id", self.video_columns),
        )

    def _read_log(self, file: Path, fields: Sequence[str]) -> EventTable:
        columns = EventColumns("user_id", "video_id", "time_ms", time_unit="ms")
        flags = {name: (0, 1) for name in fields if name.startswith("is_") or name == "long_view"}
        first, last = self.first_day or 0, self.last_day or math.inf
        chosen_days = [] if self.first_day is self.last_day is None else [_DAY]
        events = read_events(
            file,
            columns,
            [*fields, *chosen_days],
            drop_bad_rows=self.drop_bad_rows,
            limits=flags,
        )
        if not chosen_days:
            return events
        days = events.values[_DAY]
        return events.take((first <= days) & (days <= last))

    def _logs(self) -> list[Path]:
        return matching(existing(self.path), self.logs)

    def _user_files(self) -> list[Path]:
        folder = existing(self.path)
        return matching(folder, ("user_features*.csv",))[:1] if self.user_columns else []

    def _video_files(self) -> list[Path]:
        folder = existing(self.path)
        return matching(folder, _VIDEO_FILES)[:1] if self.video_columns else []


def _side(files: list[Path], id_column: str, columns: tuple[str, ...]) -> SideTable | None:
    return read_side_table(files[0], id_column, columns) if files else None
