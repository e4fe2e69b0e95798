"""The batches that hosts take: jagged tensors of requests (ranking) or sequences (pre-training)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TypeVar

import numpy as np
import torch

_T = TypeVar("_T", bound="_OnDevice")


class _OnDevice:
    """`to` for dataclasses of tensors and dicts of tensors."""

    def to(self: _T, device: torch.device | str, non_blocking: bool = False) -> _T:
        return self._map(lambda value: value.to(device, non_blocking=non_blocking))

    def _map(self: _T, change: Callable[[torch.Tensor], torch.Tensor]) -> _T:
        def move(value: object) -> object:
            if isinstance(value, dict):
                return {name: move(inner) for name, inner in value.items()}
            assert isinstance(value, torch.Tensor)
            return change(value)

        moved = {f.name: move(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]
        return type(self)(**moved)


@dataclass
class Batch(_OnDevice):
    """B requests: a history and some candidates each. T history items, C candidates in all.

    A history holds events strictly before the request's last (or first) candidate; a host must
    still hide, for each candidate, the history items with t_i >= t_C.

    Attributes:
        history_items: [T] int64, 0..num_items-1, oldest first.
        history_timestamps: [T] int64 seconds, ascending inside a request.
        history_actions: [T] int64, 0..num_actions-1.
        history_offsets: [B + 1] int64 into the history.
        candidate_items: [C] int64.
        candidate_timestamps: [C] int64 seconds, ascending inside a request.
        candidate_labels: [C] float32, 0 or 1.
        candidate_offsets: [B + 1] int64 into the candidates.
        users: [B] int64, 0..num_users-1.
        user_features: name -> [B] int64 codes. Item features are looked up by item id
            in InteractionLog.item_features.
        candidate_features: name -> [C] float32, what the loader was asked for: the fields of
            CandidateStatistics, or nothing.
        task_labels: name -> [C] float32, 0 or 1, of further tasks.
    """

    history_items: torch.Tensor
    history_timestamps: torch.Tensor
    history_actions: torch.Tensor
    history_offsets: torch.Tensor
    candidate_items: torch.Tensor
    candidate_timestamps: torch.Tensor
    candidate_labels: torch.Tensor
    candidate_offsets: torch.Tensor
    users: torch.Tensor
    user_features: dict[str, torch.Tensor] = field(default_factory=dict)
    candidate_features: dict[str, torch.Tensor] = field(default_factory=dict)
    task_labels: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def num_requests(self) -> int:
        """B."""
        return self.users.numel()

    @property
    def num_candidates(self) -> int:
        """C."""
        return self.candidate_items.numel()


@dataclass
class SequenceBatch(_OnDevice):
    """B user sequences without candidates, for masked item modelling.

    Attributes:
        items: [T] int64.
        timestamps: [T] int64 seconds, ascending inside a sequence.
        actions: [T] int64.
        offsets: [B + 1] int64.
        users: [B] int64.
    """

    items: torch.Tensor
    timestamps: torch.Tensor
    actions: torch.Tensor
    offsets: torch.Tensor
    users: torch.Tensor


def tensor(values: np.ndarray, dtype: type = np.int64) -> torch.Tensor:
    """A writable tensor of a copy of the values, which may be a read-only memory map."""
    return torch.from_numpy(np.array(values, dtype=dtype))
