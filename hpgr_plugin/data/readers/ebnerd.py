"""EB-NeRD: impressions of a news site with list columns, and the click history before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as arrow_parquet

from hpgr_plugin.data.errors import DataError
from hpgr_plugin.data.events import EventTable, location
from hpgr_plugin.data.readers.assemble import EventColumns, check_events, concatenate
from hpgr_plugin.data.readers.files import existing, matching, read_parquet
from hpgr_plugin.data.readers.side import read_side_table

_BEHAVIORS = ("behaviors.parquet", "*/behaviors.parquet", "*behaviors*.parquet")
_HISTORY = ("history.parquet", "*/history.parquet", "*history*.parquet")
_LABEL = "is_click"


@dataclass(frozen=True, kw_only=True)
class EBNeRDReader:
    """Every article of an impression is an exposure, in order; the field for labels is `is_click`.

    Reads the data set's own parquet, whose rows hold lists, or flat tables with the columns
    impression_id, user_id, item_id, ts, label (exposures) and user_id, item_id, ts (history).

    Reads of the history file are history only, with is_click = 1. One that is not strictly
    before the user's first impression is left out: from there on the impressions' own clicks
    tell the story, and the same click would count twice. Columns that are known only after the
    impression (read_time, scroll_percentage, next_*) are never read.

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
                raise DataError(f"EB-NeRD has the field {_LABEL!r} alone", field=name)
        exposures = concatenate([self._exposures(f) for f in self._files(self.behaviors)])
        history = concatenate([self._reads(f) for f in self._files(self.history)])
        history = _before_exposures(history, exposures)
        articles = self._articles()
        side = (
            read_side_table(articles[0], "article_id", self.article_columns) if articles else None
        )
        return replace(concatenate([history, exposures]), item_features=side)

    def _exposures(self, file: Path) -> EventTable:
        rows = None
        if _has(file, "article_ids_inview"):
            table, rows = _exploded_behaviors(file)
        else:
            table = read_parquet(file, ["user_id", "item_id", "ts", "impression_id", "label"])
            table = table.rename_columns({"label": _LABEL})
        return self._events(table, file, rows, group="impression_id")

    def _reads(self, file: Path) -> EventTable:
        rows = None
        if _has(file, "article_id_fixed"):
            table, rows = _exploded_history(file)
        else:
            table = read_parquet(file, ["user_id", "item_id", "ts"])
        clicked = pa.array(np.ones(table.num_rows))
        events = self._events(table.append_column(_LABEL, clicked), file, rows)
        return replace(events, candidate=np.zeros(len(events.timestamp), dtype=bool))

    def _events(
        self, table: pa.Table, file: Path, rows: np.ndarray | None, group: str | None = None
    ) -> EventTable:
        return check_events(
            table,
            file,
            EventColumns("user_id", "item_id", "ts", group),
            fields=[_LABEL],
            drop_bad_rows=self.drop_bad_rows,
            file_rows=rows,
        )

    def _files(self, patterns: tuple[str, ...]) -> list[Path]:
        return matching(existing(self.path), patterns)

    def _articles(self) -> list[Path]:
        return self._files(("articles.parquet",)) if self.article_columns else []


def _has(file: Path, column: str) -> bool:
    return column in arrow_parquet.read_schema(file).names


def _exploded_behaviors(file: Path) -> tuple[pa.Table, np.ndarray]:
    """One row an article of an impression, and the 1-based row of the file of each."""
    columns = ["user_id", "impression_id", "impression_time"]
    table = read_parquet(file, [*columns, "article_ids_inview", "article_ids_clicked"])
    inview = _lists(table, "article_ids_inview", file)
    clicked = _lists(table, "article_ids_clicked", file)
    parent = pc.list_parent_indices(inview)
    articles = pc.list_flatten(inview)
    exploded = pa.table(
        {
            "user_id": table["user_id"].take(parent),
            "impression_id": table["impression_id"].take(parent),
            "ts": table["impression_time"].take(parent),
            "item_id": articles,
            _LABEL: pa.array(_clicked(parent, articles, clicked).astype(np.int8)),
        }
    )
    return exploded, parent.to_numpy() + 1


def _clicked(parent: pa.Array, articles: pa.Array, clicked: pa.Array) -> np.ndarray:
    """True where the impression's clicked articles hold the article."""
    places = pd.MultiIndex.from_arrays([parent.to_numpy(), articles.to_pandas()])
    hits = pd.MultiIndex.from_arrays(
        [pc.list_parent_indices(clicked).to_numpy(), pc.list_flatten(clicked).to_pandas()]
    )
    return places.isin(hits)


def _exploded_history(file: Path) -> tuple[pa.Table, np.ndarray]:
    """One row an article read, and the 1-based row of the file of each."""
    table = read_parquet(file, ["user_id", "impression_time_fixed", "article_id_fixed"])
    articles = _lists(table, "article_id_fixed", file)
    times = _lists(table, "impression_time_fixed", file)
    uneven = pc.not_equal(pc.list_value_length(articles), pc.list_value_length(times))
    if (row := pc.index(uneven, True).as_py()) >= 0:
        problem = "another number of times than of articles"
        raise DataError(problem, file=file, row=row + 1, field="impression_time_fixed")
    parent = pc.list_parent_indices(articles)
    exploded = pa.table(
        {
            "user_id": table["user_id"].take(parent),
            "item_id": pc.list_flatten(articles),
            "ts": pc.list_flatten(times),
        }
    )
    return exploded, parent.to_numpy() + 1


def _lists(table: pa.Table, column: str, file: Path) -> pa.Array:
    lists = table[column].combine_chunks()
    if (row := pc.index(pc.is_null(lists), True).as_py()) >= 0:
        raise DataError("no list", file=file, row=row + 1, field=column)
    return lists


def _before_exposures(history: EventTable, exposures: EventTable) -> EventTable:
    """The reads strictly before the user's first exposure, each once."""
    first = pd.Series(exposures.timestamp).groupby(exposures.user.to_pandas()).min()
    frame = pd.DataFrame(
        {
            "user": history.user.to_pandas(),
            "item": history.item.to_pandas(),
            "timestamp": history.timestamp,
        }
    )
    # Histories of two periods overlap; users without an impression have only a history.
    late = frame["timestamp"] >= frame["user"].map(first)
    kept = (~late & ~frame.duplicated()).to_numpy()
    return replace(
        history,
        user=history.user.filter(pa.array(kept)),
        item=history.item.filter(pa.array(kept)),
        timestamp=history.timestamp[kept],
        values={name: value[kept] for name, value in history.values.items()},
        candidate=np.zeros(int(kept.sum()), dtype=bool),
    )
