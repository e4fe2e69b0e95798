"""SlateGenerator: answers a history with a slate, from the file that training wrote."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hpgr_plugin.data.batch import Batch
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.embedded.slates.artefact import load_model
from hpgr_plugin.hosts.embedded.slates.model import SlateModel


class History(NamedTuple):
    """One user's past, oldest first.

    Attributes:
        items: ids of the source.
        timestamps: seconds, ascending.
        actions: codes of the log, 0..num_actions-1; None: 0 each.
    """

    items: Sequence[Any]
    timestamps: Sequence[int]
    actions: Sequence[int] | None = None


class Slate(NamedTuple):
    """An answer: ids of the source, and the log-probability of each given the ones before."""

    items: list[Any]
    log_probs: list[float]


class SlateGenerator:
    """A trained slate model and its vocabulary.

    Args:
        model: trained.
        item_ids: the source's id of every item, by code.
        device: where it runs.
    """

    def __init__(
        self, model: SlateModel, item_ids: Sequence[Any], device: torch.device | str = "cpu"
    ) -> None:
        self.model, self.item_ids = model.to(device).eval(), list(item_ids)
        self.device = torch.device(device)
        self._codes = {identifier: code for code, identifier in enumerate(self.item_ids)}

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> SlateGenerator:
        """Read slates.safetensors of the stage `slates` or `align`."""
        return cls(*load_model(Path(path)), device)

    def slates(self, histories: Sequence[History], *, width: int | None = None) -> list[Slate]:
        """A slate for every history; items that training did not know are passed over.

        Args:
            histories: an empty one is answered too; of a long one the most recent part is read.
            width: of the beam search; None takes the model's.

        Raises:
            HpgrError: lengths that differ, times out of order, or an action out of its range.
        """
        if not histories:
            return []
        found = self.model.generate(self._batch(histories), width=width)
        return [
            Slate([self.item_ids[item] for item in items], scores)
            for items, scores in zip(found.items.tolist(), found.log_probs.tolist(), strict=True)
        ]

    def _batch(self, histories: Sequence[History]) -> Batch:
        rows = [self._known(number, history) for number, history in enumerate(histories)]
        lengths = torch.tensor([len(row) for row in rows])
        columns = torch.tensor([event for row in rows for event in row], dtype=torch.long)
        items, times, actions = columns.view(-1, 3).unbind(1)
        nothing = torch.zeros(0, dtype=torch.long)
        empty = torch.zeros(len(rows) + 1, dtype=torch.long)
        batch = Batch(
            history_items=items,
            history_timestamps=times,
            history_actions=actions,
            history_offsets=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
            candidate_items=nothing,
            candidate_timestamps=nothing,
            candidate_labels=nothing.float(),
            candidate_offsets=empty,
            users=torch.arange(len(rows)),
        )
        return batch.to(self.device)

    def _known(self, number: int, history: History) -> list[tuple[int, int, int]]:
        """Code, time and action of the events whose items are known, the most recent ones."""
        items, times, actions = history
        actions = [0] * len(items) if actions is None else actions
        if not len(items) == len(times) == len(actions):
            raise HpgrError(f"history {number} must have as many timestamps and actions as items")
        if any(b < a for a, b in itertools.pairwise(times)):
            raise HpgrError(f"history {number} must be in order of time, oldest first")
        most = self.model.settings["num_actions"]
        if any(not 0 <= action < most for action in actions):
            raise HpgrError(f"history {number} must have actions of 0 to {most - 1}")
        known = [
            (self._codes[item], int(time), int(action))
            for item, time, action in zip(items, times, actions, strict=True)
            if item in self._codes
        ]
        return known[-self.model.max_history :]
