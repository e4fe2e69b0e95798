"""Requests for slates: checked by field, in the ids of the source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hpgr_plugin.hosts.embedded.slates.generator import History, Slate, SlateGenerator
from hpgr_plugin.serving.requests import check_length, history_times
from hpgr_plugin.serving.vocabulary import RequestError

MODEL_FILE = "slates.safetensors"


@dataclass(frozen=True)
class SlateAnswer:
    """The answer to one request.

    Attributes:
        slate: items and their log-probabilities, in the order of the slots.
        unknown_history: history items that the model does not have; they were left out.
    """

    slate: Slate
    unknown_history: int


class SlateServer:
    """Answers histories with slates, several at a time.

    Args:
        generator: of a trained slate model.
    """

    def __init__(self, generator: SlateGenerator) -> None:
        self.generator = generator
        self._known = frozenset(generator.item_ids)
        self._kind = str if generator.item_ids and isinstance(generator.item_ids[0], str) else int

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device | None = None) -> SlateServer:
        """Of a folder of the stages `slates` or `align`, or of the file in it.

        Args:
            folder: that was written.
            device: None takes a GPU if there is one.

        Raises:
            FileNotFoundError: no model there.
            ArtefactError: it is damaged or of another kind.
        """
        path = Path(folder)
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(SlateGenerator.load(path / MODEL_FILE if path.is_dir() else path, place))

    def encode(
        self, items: Sequence[Any], times: Sequence[Any], actions: Sequence[Any] | None
    ) -> History:
        """Check a history; any thread may do so.

        Args:
            items: ids of the source, oldest first; those that the model does not have are left out.
            times: seconds, ascending.
            actions: codes of the log, 0..num_actions-1; None: 0 each.

        Raises:
            RequestError: naming the field.
        """
        for place, item in enumerate(items):
            if type(item) is not self._kind:
                expected = "text" if self._kind is str else "an integer"
                raise RequestError(
                    f"history.items[{place}]",
                    f"item ids of this model are {expected}, got {item!r}",
                )
        seconds = history_times(times, len(items))
        if actions is not None:
            self._check_actions(actions, len(items))
        return History(items, seconds.tolist(), actions)

    def _check_actions(self, actions: Sequence[Any], length: int) -> None:
        check_length(actions, "history.actions", length)
        most = self.generator.model.settings["num_actions"] - 1
        for place, action in enumerate(actions):
            if type(action) is not int or not 0 <= action <= most:
                raise RequestError(
                    f"history.actions[{place}]", f"takes a code of 0 to {most}, got {action!r}"
                )

    def answer(self, histories: Sequence[History]) -> list[SlateAnswer]:
        """The slates of some checked histories, generated together; one thread at a time."""
        slates = self.generator.slates(histories)
        return [
            SlateAnswer(slate, sum(item not in self._known for item in history.items))
            for slate, history in zip(slates, histories, strict=True)
        ]
