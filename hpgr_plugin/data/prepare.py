"""From a source to PreparedData, through the cache."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from hpgr_plugin.data import cache
from hpgr_plugin.data.build import build_log
from hpgr_plugin.data.events import Reader, require
from hpgr_plugin.data.labels import LabelRule, task_rules
from hpgr_plugin.data.log import PreparedData
from hpgr_plugin.data.split import Split

logger = logging.getLogger(__name__)


def prepare_data(
    *,
    reader: Reader,
    label: LabelRule,
    split: Split,
    tasks: Mapping[str, str | LabelRule] = MappingProxyType({}),
    action: str | None = None,
    history_events: Literal["all", "positives"] = "all",
    min_user_events: int = 1,
    min_item_events: int = 1,
    min_user_sessions: int = 1,
    session_gap_seconds: int = 1800,
    cache_dir: str | None = "cache",
) -> PreparedData:
    """Reads, labels, codes, sorts and splits a log, or takes it from the cache.

    Args:
        reader: where the events come from, such as @hpgr.MovieLensReader().
        label: which events are positives, such as @hpgr.rating_at_least().
        split: such as @hpgr.LastFractionSplit().
        tasks: further labels by the names of their tasks: {'like': 'is_like'} for a field of 0 and
            1, or a rule as for `label`, which stays the main task.
        action: the field whose values become the actions of the history. None: the label.
        history_events: "all" | "positives": which events later requests may see.
        min_user_events, min_item_events: minimum counts, applied once (see build_log).
        min_user_sessions: drop users with fewer sessions.
        session_gap_seconds: a session ends where more than this many seconds pass.
        cache_dir: folder of the cache, keyed by the content of the sources and all of the
            above. None: no cache.

    Raises:
        DataError: a source cannot be read, or nothing is left of it.
    """
    fits = history_events in ("all", "positives")
    require(fits, "prepare_data.history_events", "'all' or 'positives'", history_events)
    counts = {
        "min_user_events": min_user_events,
        "min_item_events": min_item_events,
        "min_user_sessions": min_user_sessions,
        "session_gap_seconds": session_gap_seconds,
    }
    for name, count in counts.items():
        require(count >= 0, f"prepare_data.{name}", "0 or more", count)
    settings: dict[str, Any] = {
        "reader": cache.settings_of(reader),
        "label": cache.settings_of(label),
        "split": cache.settings_of(split),
        "action": action,
        "history_events": history_events,
        **counts,
    }

    rules = task_rules(tasks)
    if rules:  # otherwise the key is that of a log with one task
        settings["tasks"] = {name: cache.settings_of(rule) for name, rule in rules.items()}
    named = [label.field, action or label.field, *(rule.field for rule in rules.values())]

    def prepare() -> PreparedData:
        events = reader.read(list(dict.fromkeys(named)))
        labels = label.labels(events.values[label.field])
        log, is_candidate = build_log(
            events,
            label=labels,
            action=events.values[action] if action else labels,
            task_labels={name: r.labels(events.values[r.field]) for name, r in rules.items()},
            **counts,
        )
        dropped = {file: count for file, count in events.dropped.items() if count}
        for file, count in dropped.items():
            logger.warning("%s: dropped %d bad rows", file, count)
        return PreparedData(
            log=log,
            split=split.assign(log, is_candidate),
            is_history=(log.label == 1) | (history_events == "all"),
            is_candidate=is_candidate,
            dropped=dropped,
            settings=settings,
        )

    if cache_dir is None:
        return prepare()
    entry = Path(cache_dir).expanduser() / cache.cache_key(reader.sources(), settings)
    with cache.exclusive(entry):
        if (found := cache.load(entry)) is None:
            cache.store(entry, prepare())
            found = cache.load(entry)
    assert found is not None
    return found
