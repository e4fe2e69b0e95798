"""A log with its split: what prepare_data returns and everything else starts from."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from hpgr_plugin.data.log import InteractionLog
from hpgr_plugin.data.ranges import offsets_of
from hpgr_plugin.data.split import SPLITS


@dataclass(frozen=True)
class PreparedData:
    """The log and the part each event plays.

    Attributes:
        log: every event.
        split: int8 [E], index into SPLITS.
        is_history: bool [E]; events that later requests of the user may see.
        is_candidate: bool [E]; events that are ranked.
        dropped: file name -> bad rows left out.
    """

    log: InteractionLog
    split: np.ndarray
    is_history: np.ndarray
    is_candidate: np.ndarray
    dropped: dict[str, int] = field(default_factory=dict)

    @cached_property
    def history_rows(self) -> np.ndarray:
        """Rows of the log that are history, int64 [H]."""
        return np.flatnonzero(self.is_history)

    @cached_property
    def history_offsets(self) -> np.ndarray:
        """User u owns history_rows[history_offsets[u]:history_offsets[u + 1]]; int64 [U + 1]."""
        return offsets_of(self.is_history)[self.log.user_offsets]

    def summary(self) -> str:
        """One line: users, items, events and how the candidates are split."""
        log = self.log
        counts = np.bincount(self.split[self.is_candidate], minlength=len(SPLITS))
        parts = ", ".join(f"{n:,} {name}" for n, name in zip(counts, SPLITS, strict=True))
        positive = log.label[self.is_candidate].mean() if self.is_candidate.any() else 0.0
        dropped = sum(self.dropped.values())
        return (
            f"{log.num_users:,} users, {log.num_items:,} items, {log.num_events:,} events; "
            f"candidates: {parts}; {positive:.1%} positive"
            + (f"; {dropped:,} bad rows dropped" if dropped else "")
        )
