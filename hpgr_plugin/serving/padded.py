"""One request over a kept history in tensors of a fixed size, as a CUDA graph needs it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hpgr_plugin.components.captured import padded_size
from hpgr_plugin.serving.anchors import ScoredHistory
from hpgr_plugin.serving.history_cache import HistoryState, ReadyHistory, ReadyPlan
from hpgr_plugin.serving.kept_candidates import KeptCandidates
from hpgr_plugin.serving.kept_rows import window_of
from hpgr_plugin.serving.requests import EncodedCandidates

_FEWEST_AGAIN = 64
_NUM_SCALARS = 3


class Sizes(NamedTuple):
    """Of the tensors; what requests of one size share.

    Attributes:
        candidates: room for so many.
        items: of the history.
        again: items that occur earlier in the history too.
        spare: of `ScoredHistory`.
        planned: whether a plan is made; else all of the history is read.
    """

    candidates: int
    items: int
    again: int
    spare: int
    planned: bool

    @classmethod
    def of(cls, request: EncodedCandidates, state: HistoryState) -> Sizes:
        """For a request over a ready state."""
        assert state.ready is not None
        plan, again, spare = state.ready.plan, 0, 0
        if plan is not None and plan.scored is not None:
            spare = plan.scored.spare
            if len(plan.scored.again):
                again = max(_FEWEST_AGAIN, 1 << (len(plan.scored.again) - 1).bit_length())
        return cls(
            padded_size(request.candidates.shape[1]),
            padded_size(state.num_items),
            again,
            spare,
            plan is not None,
        )


class PaddedRequest:
    """Room for a request and its history, and the function that scores what lies there.

    The function is that of `KeptCandidates`. In padding, values are 0, so that attention adds
    nothing, and items of the history are no anchors.

    Args:
        kept: of the model.
        sizes: of the tensors.
        like: a history that is planned as those that will come.
    """

    def __init__(self, kept: KeptCandidates, sizes: Sizes, like: ReadyHistory) -> None:
        self.sizes = sizes
        self._kept = kept
        tokens = kept.context + sizes.items
        self._numbers = like.marks.new_zeros(sizes.candidates + _NUM_SCALARS)
        self._layers = like.layers.new_zeros(*like.layers.shape[:3], tokens, like.layers.shape[4])
        self._marks = like.marks.new_zeros(2, tokens)
        self._repeats = like.marks.new_zeros(2, sizes.again)
        scored = None if like.plan is None else like.plan.scored
        self._rows = None
        if scored is not None:
            self._rows = scored.rows.new_zeros(sizes.items, scored.rows.shape[1])
            # Kept here: a graph reads it where it is.
            self._window = window_of(kept.plan_settings, sizes.items, scored.rows)

    def pack(self, request: EncodedCandidates, state: HistoryState) -> np.ndarray:
        """What is not on the device, int64 `[candidates + 3]`; `load` takes it from there."""
        items, times = request.candidates
        numbers = np.zeros(self.sizes.candidates + _NUM_SCALARS, np.int64)
        numbers[: len(items)] = items
        numbers[-_NUM_SCALARS:] = state.num_items, times[0], len(items)
        return numbers

    def load(self, numbers: Tensor, history: ReadyHistory) -> None:
        """Put a request in its place: `pack` on the device, and its history."""
        self._numbers.copy_(numbers)
        count = history.num_tokens
        self._layers[:, :, :, :count].copy_(history.layers)
        self._layers[:, :, :, count:].zero_()
        # What an earlier history left in the rest are places of the tables, and finite rows.
        self._marks[:, :count].copy_(history.marks)
        if self._rows is None or history.plan is None or history.plan.scored is None:
            return
        scored = history.plan.scored
        self._rows[: scored.length].copy_(scored.rows[: scored.length])
        if self.sizes.again:
            count = len(scored.again)
            self._repeats[0, :count].copy_(scored.again)
            self._repeats[1, :count].copy_(scored.origin)
            self._repeats[:, count:].zero_()  # the first item occurs first where it does

    @torch.no_grad()
    def scores(self) -> Tensor:
        """The logits of what lies here, `[1 + tasks + 1, candidates]`; padding has some, too.

        The last row is inf where `KeptCandidates.logits_and_ties` has a tie, else -inf.
        """
        items = self._numbers[:-_NUM_SCALARS]
        length, time, count = self._numbers[-_NUM_SCALARS:].unbind()
        history = ReadyHistory(self._layers, self._marks, self._plan(length))
        logits, tied = self._kept.logits_and_ties(items, length.unsqueeze(0), time, history)
        if tied is None:
            return torch.cat([logits, logits.new_full((1, len(items)), -math.inf)])
        tied = tied & (torch.arange(len(items), device=items.device) < count)
        ties = torch.where(tied, math.inf, -math.inf).to(logits.dtype)
        return torch.cat([logits, ties.unsqueeze(0)])

    def _plan(self, length: Tensor) -> ReadyPlan | None:
        """Of the history that lies here, which has `length` items."""
        if not self.sizes.planned:
            return None
        settings, context, device = self._kept.plan_settings, self._kept.context, length.device
        begin = length - settings.recent
        near = begin + context + torch.arange(settings.recent, device=device)
        if context:
            near = torch.cat([torch.arange(context, device=device), near])
        if self._rows is None:
            return ReadyPlan(None, None, near, begin - 1)
        places = torch.arange(self.sizes.items, device=device)
        hidden = self._rows.new_zeros(self.sizes.items).masked_fill_(places >= length, -math.inf)
        again, origin = self._repeats.unbind()
        sizes = self.sizes
        scored = ScoredHistory(self._rows, again, origin, hidden, sizes.items, sizes.spare)
        return ReadyPlan(scored, self._window, near, begin - 1)
