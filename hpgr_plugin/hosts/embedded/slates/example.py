"""One user's slate in words: the last items of the history, the slate, and what came next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hpgr_plugin.config.registry import build
from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.hosts.embedded.slates.evaluation import OUTCOMES, Outcomes, load_outcomes

_SHOWN = 5


def example_slate(task: Task, directory: Path) -> str:
    """The test slate with the most hits, in the titles of `hpgr.ItemTitles`, or in item ids.

    Args:
        task: data.
        directory: of a trained model.
    """
    found, log = load_outcomes(directory / OUTCOMES), task.data.log
    titles: dict[str, str] = build("ItemTitles").read()
    row = int(np.argmax(_hits(found)))
    user = int(found.user[row])
    start, end = task.data.history_offsets[user : user + 2]
    target = found.target[row][found.target[row] >= 0]
    events = log.item[task.data.history_rows[start:end]]
    before = events[~np.isin(events, target)][-_SHOWN:]

    def names(items: np.ndarray, marked: np.ndarray) -> list[str]:
        ids = [str(log.item_ids[item]) for item in items]
        mark = ["*" if item in marked else " " for item in items]
        return [f"  {m} {titles.get(i, f'item {i}')}" for m, i in zip(mark, ids, strict=True)]

    nothing = np.zeros(0, dtype=np.int64)
    lines: list[Any] = [f"An example, user {log.user_ids[user]}: the slate with the most hits (*)."]
    lines += ["last items of the history:", *names(before, nothing)]
    lines += ["slate:", *names(found.slate[row], target)]
    lines += ["what came next:", *names(target, found.slate[row])]
    return "\n".join(lines)


def _hits(found: Outcomes) -> np.ndarray:
    return (found.slate[:, :, None] == found.target[:, None, :]).any(1).sum(1)
