"""EB-NeRD: impressions of a news site with list columns, and the click history before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from hpgr_plugin.data.events import DataError, EventTable, location
from hpgr_plugin.data.readers.assemble import (
    EventColumns,
    check_events,
    concatenate,
    read_side_table,
)
from hpgr_plugin.data.readers.checks import RowChecks, as_text
from hpgr_plugin.data.readers.files import existing, matching, parquet_columns, read_parquet

_BEHAVIORS = ("behaviors.parquet", "*/behaviors.parquet", "*behaviors*.parquet")
_HISTORY = ("history.parquet", "*/history.parquet", "*history*.parquet")
_LABEL = "is_click"


@dataclass(frozen=True, kw_only=True)
class EBNeRDReader:
    """Every article of an impression is an exposure, in order; the field for labels is `is_click`.

    Reads the data set's own parquet, whose rows hold lists, or flat tables with the columns
    impression_id, user_id, item_id, ts, label (exposures) and user_id, item_id, ts (history).

    Articles of the history file are only history, with is_click = 1. Those not strictly before
    the user's first impression are left out, because the impressions hold the same clicks again.
    Columns that are known only after the impression (read_time, scroll_percentage, next_*) are
    never read.

    Args:
        path: the folder.
        behaviors, history: patterns; all files of the first that finds any are read.
        article_columns: columns of `articles.parquet` to read as features of items.
        drop_bad_rows: drop and count bad rows instead of raising.
    """

    path: str = location("")
    behaviors: tuple[str, ...] = _BEHAVIORS
    history: tuple[str, ...] = _HISTORY
    article_columns: tuple[str, ...] = ()
    drop_bad_rows: bool = False

    def sources(self) -> list[Path]:
        """Impressions, histories, and the articles where they are read."""
        return [*self._files(self.behaviors), *self._files(self.history), *self._articles()]

    def read(self, fields: Sequence[str]) -> EventTable:
        """History before the first impression, then the exposures."""
        for name in fields:
            if name != _LABEL:
                raise DataError(f"EB-NeRD has only the field {_LABEL!r}", field=name)
        exposures = concatenate([self._exposures(f) for f in self._files(self.behaviors)])
        history = concatenate([self._reads(f) for f in self._files(self.history)])
        history = _before_exposures(history, exposures)
        articles = self._articles()
        side = (
            read_side_table(articles[0], "article_id", self.article_columns) if articles else None
        )
        return replace(concatenate([history, exposures]), item_features=side)

    def _exposures(self, file: Path) -> EventTable:
        if "article_ids_inview" in parquet_columns(file):
            checks = self._exploded_behaviors(file)
        else:
            table = read_parquet(file, ["user_id", "item_id", "ts", "impression_id", "label"])
            checks = self._checks(file, table.rename_columns({"label": _LABEL}))
        columns = EventColumns("user_id", "item_id", "ts", "impression_id")
        return check_events(checks, columns, [_LABEL], {_LABEL: (0, 1)})

    def _reads(self, file: Path) -> EventTable:
        if "article_id_fixed" in parquet_columns(file):
            checks = self._exploded_history(file)
        else:
            checks = self._checks(file, read_parquet(file, ["user_id", "item_id", "ts"]))
        events = check_events(checks, EventColumns("user_id", "item_id", "ts"), [])
        clicked = np.ones(len(events.timestamp))
        return replace(events, values={_LABEL: clicked}, candidate=clicked == 0)

    def _checks(self, file: Path, table: pa.Table, **changes: Any) -> RowChecks:
        return RowChecks(table, file, drop_bad_rows=self.drop_bad_rows, **changes)

    def _exploded_behaviors(self, file: Path) -> RowChecks:
        """One row per article in view of the good impressions."""
        single = {"user_id": "user_id", "impression_id": "impression_id", "impression_time": "ts"}
        lists = ["article_ids_inview", "article_ids_clicked"]
        checks = self._checks(file, read_parquet(file, list(single), lists))
        shown, clicked = (_lists(checks, name) for name in lists)
        is_click, unseen = _clicks(shown, clicked)
        checks.judge(lists[1], unseen, "clicked articles that are not in view")
        is_click = is_click[checks.good[pc.list_parent_indices(shown).to_numpy()]]
        table, rows = _exploded(checks, single, {lists[0]: "item_id"})
        table = table.append_column(_LABEL, pa.array(is_click))
        return self._checks(file, table, file_rows=rows, num_lost=checks.num_bad)

    def _exploded_history(self, file: Path) -> RowChecks:
        """One row per article read of the good rows."""
        lists = {"article_id_fixed": "item_id", "impression_time_fixed": "ts"}
        checks = self._checks(file, read_parquet(file, ["user_id"], list(lists)))
        lengths = [pc.fill_null(pc.list_value_length(_lists(checks, name)), 0) for name in lists]
        problem = "another number of times than of articles"
        checks.judge("impression_time_fixed", pc.not_equal(*lengths), problem)
        table, rows = _exploded(checks, {"user_id": "user_id"}, lists)
        return self._checks(file, table, file_rows=rows, num_lost=checks.num_bad)

    def _files(self, patterns: tuple[str, ...]) -> list[Path]:
        return matching(existing(self.path), patterns)

    def _articles(self) -> list[Path]:
        return self._files(("articles.parquet",)) if self.article_columns else []


def _lists(checks: RowChecks, name: str) -> pa.Array:
    """A column of lists; a missing list makes a bad row."""
    lists = checks.table[name].combine_chunks()
    checks.judge(name, pc.is_null(lists), "no list")
    return lists


def _clicks(shown: pa.Array, clicked: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Whether each article in view was clicked [E], and impressions [R] with a click not in view.

    Args:
        shown: [R] lists of articles, E in all.
        clicked: [R] lists of articles.
    """
    parents = [pc.list_parent_indices(lists).to_numpy() for lists in (shown, clicked)]
    articles = [as_text(pc.list_flatten(lists)) for lists in (shown, clicked)]
    code = pa.concat_arrays(articles).dictionary_encode("encode").indices.to_numpy()
    key = np.concatenate(parents) * (len(code) + 1) + code
    in_view, click = key[: len(parents[0])], key[len(parents[0]) :]
    unseen = np.zeros(len(shown), dtype=bool)
    unseen[parents[1][~np.isin(click, in_view)]] = True
    return np.isin(in_view, click), unseen


def _exploded(
    checks: RowChecks, single: dict[str, str], lists: dict[str, str]
) -> tuple[pa.Table, np.ndarray]:
    """One row per element of the good rows' lists, and the file's row of each, 1-based.

    Args:
        checks: a table with one impression or user per row.
        single: columns with one value per row, and their new names.
        lists: columns with a list per row, of one length in every row, and their new names.
    """
    table = checks.table.filter(pa.array(checks.good))
    parent = pc.list_parent_indices(table[next(iter(lists))].combine_chunks())
    columns = {new: table[old].take(parent) for old, new in single.items()}
    columns |= {new: pc.list_flatten(table[old]) for old, new in lists.items()}
    return pa.table(columns), np.flatnonzero(checks.good)[parent.to_numpy()] + 1


def _before_exposures(history: EventTable, exposures: EventTable) -> EventTable:
    """The reads strictly before the user's first exposure, each once."""
    users = [history.user, exposures.user]
    if users[0].type != users[1].type:
        users = [as_text(each) for each in users]
    first = pd.Series(exposures.timestamp).groupby(users[1].to_pandas()).min()
    frame = pd.DataFrame(
        {
            "user": users[0].to_pandas(),
            "item": history.item.to_pandas(),
            "timestamp": history.timestamp,
        }
    )
    # Histories of two periods overlap; users without an impression have only a history.
    late = frame["timestamp"] >= frame["user"].map(first)
    return history.take((~late & ~frame.duplicated()).to_numpy())
