"""Anchors at serving time: one matrix product of candidates and a history, and a top-k.

`plan_preferences` scores pair by pair, so that a plan never depends on the rest of the batch. Here
a history is scored for all candidates at once. An item that is repeated gets one score, and of
equal scores the most recent still wins. The anchors are the same but for items whose scores differ
by rounding only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hpgr_plugin.serving.chunks import rows_at_once

_FEW_SCORES = {"cpu": 2**15, "cuda": 2**22}  # of which the largest are looked for at once
_GROUP = 8  # scores of which only the largest is looked at first
# Best items behind the K-th, among which its equals are looked for: on a CPU looking again, where
# there is an equal one, costs less.
_SPARE = {"cpu": 1, "cuda": 8}
_MOST_SPARE = 512


@dataclass(frozen=True, eq=False)
class ScoredHistory:
    """What chooses the anchors in one history.

    Attributes:
        rows: `[N, D]`, the embeddings that are scored, float32 at least; any in padding.
        again: int64 `[R]`, places of the items that occur earlier in the history too.
        origin: int64 `[R]`, where each of them occurs first. Further pairs may be a place that
            occurs first, and the same place.
        hidden: `[N]`, 0 and -inf in padding; None without padding.
        length: items of the history, or more where at least K of the rows are no padding.
        spare: best items behind the K-th, among which its equals are looked for.
    """

    rows: Tensor
    again: Tensor
    origin: Tensor
    hidden: Tensor | None
    length: int
    spare: int

    @classmethod
    def of(cls, rows: Tensor, ids: Tensor, spare: int | None = None) -> ScoredHistory:
        """Of the scored embeddings `[n, D]` of these items `[n]`; None: see `spare_for`."""
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        length, hidden = len(rows), None
        padding = -length % _group_of_groups(length)
        if padding:
            rows = F.pad(rows, (0, 0, 0, padding))
            hidden = F.pad(rows.new_zeros(length), (0, padding), value=-math.inf)
        spare = _SPARE[rows.device.type] if spare is None else spare
        return cls(rows, *_repeated(ids), hidden, length, spare)

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors."""
        tensors = (self.rows, self.again, self.origin, self.hidden)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def anchors(
        self, candidates: Tensor, visible: Tensor | None, top_k: int
    ) -> tuple[Tensor, Tensor]:
        """The best items of each candidate, but for some of many equal ones.

        Nothing here waits for the device.

        Args:
            candidates: `[c, D]`.
            visible: int64 `[c]`, how many items each sees; None: all.
            top_k: K.

        Returns:
            Places, ascending, int64 `[c, K]`, as many as the history has items at most, -1 where a
            candidate sees fewer; and bool `[c]`, whether so many items are as good as the last one
            that the most recent of them may be missing: see `exact`.
        """
        count, num_rows = len(candidates), len(self.rows)
        top_k = min(top_k, self.length)
        if not top_k or not count:
            places = self.again.new_zeros(count, top_k)
            return places, places.new_zeros(count, dtype=torch.bool)
        step = rows_at_once("plan", num_rows, self.rows.device)
        if step >= count:
            return _best(self._scores(candidates, visible), visible, top_k, self.spare)
        memory, parts = self.rows.new_empty(step, num_rows), []
        for begin in range(0, count, step):
            chosen = candidates[begin : begin + step]
            seen = None if visible is None else visible[begin : begin + step]
            scores = self._scores(chosen, seen, memory[: len(chosen)])
            parts.append(_best(scores, seen, top_k, self.spare))
        return torch.cat([places for places, _ in parts]), torch.cat([tied for _, tied in parts])

    def exact(
        self, candidates: Tensor, visible: Tensor | None, anchors: Tensor, tied: Tensor
    ) -> Tensor:
        """The same anchors with the most recent of equal items; it waits for the device.

        Args:
            candidates, visible: of `anchors`.
            anchors, tied: what it returned.
        """
        if not anchors.shape[1] or not tied.any():
            return anchors
        step = rows_at_once("plan", len(self.rows), self.rows.device)
        for rows in tied.nonzero().squeeze(1).split(step):
            scores = self._scores(candidates[rows], None if visible is None else visible[rows])
            anchors = anchors.index_copy(0, rows, _most_recent(scores, anchors.shape[1]))
        return anchors

    def _scores(
        self, candidates: Tensor, visible: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        """`[c, N]`, -inf where a candidate sees nothing."""
        chosen = candidates.to(self.rows.dtype)
        if self.hidden is None:
            scores = torch.mm(chosen, self.rows.T, out=out)
        else:
            scores = torch.addmm(self.hidden, chosen, self.rows.T, out=out)
        if len(self.again):  # a matrix product may round equal columns differently
            scores.index_copy_(1, self.again, scores.index_select(1, self.origin))
        if visible is not None:
            places = torch.arange(scores.shape[1], device=scores.device)
            scores.masked_fill_(places >= visible.unsqueeze(1), -math.inf)
        return scores


def spare_for(items: np.ndarray, device: torch.device) -> int:
    """So many that an item which the history `[n]` has several times is told apart from itself."""
    least = _SPARE[device.type]
    if least == 1:
        return 1
    most = int(np.unique(items, return_counts=True)[1].max(initial=1))
    return min(_MOST_SPARE, max(least, 1 << (most - 1).bit_length()))


def _repeated(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the items that occur earlier in the history too, and where each occurs."""
    ordered, order = ids.sort(stable=True)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    again = (~begins).nonzero().squeeze(1)
    if not len(again):
        return again, again
    places = torch.arange(len(ids), device=ids.device)
    first = torch.where(begins, places, 0).cummax(0).values
    return order[again], order[first[again]]


def _best(scores: Tensor, visible: Tensor | None, top_k: int, spare: int) -> tuple[Tensor, Tensor]:
    """See `ScoredHistory.anchors`; scores `[c, N]`, K at most N."""
    count = min(top_k + spare, scores.shape[1])
    values, places = _largest(scores, count)
    worst = values[:, top_k - 1]
    tied = (worst == values[:, -1]) & worst.isfinite()
    if count == top_k or (spare > 1 and count == scores.shape[1]):
        tied = torch.zeros_like(tied)  # all equal ones are here
    if count > top_k and spare > 1:  # which of equal scores come first is not defined above
        places, order = places.sort(1, descending=True)
        values = values.gather(1, order)
        order = values.sort(dim=1, descending=True, stable=True).indices
        places = places.gather(1, order)
    places = places[:, :top_k]
    if visible is not None:
        places = torch.where(places < visible.unsqueeze(1), places, -1)
    return places.sort(1).values, tied


def _group_of_groups(length: int) -> int:
    """What the length must be a multiple of for two rounds of groups."""
    return _GROUP * _GROUP if length > _GROUP * _GROUP else 1


def _largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest scores of each row `[c, N]`, descending, and their places, `[c, count]` both.

    The best scores lie in the groups with the largest best scores: few are sorted.
    """
    length = scores.shape[1]
    small = scores.numel() <= _FEW_SCORES[scores.device.type]  # more calls would cost more
    if small or length % _GROUP or length < 4 * _GROUP * count:
        best = scores.topk(count, dim=1)
        return best.values, best.indices
    groups = length // _GROUP
    _, group = _largest(scores.unflatten(1, (_GROUP, groups)).amax(1), count)
    shift = torch.arange(0, length, groups, device=scores.device)
    members = (group.unsqueeze(2) + shift).flatten(1)
    best = scores.gather(1, members).topk(count, dim=1)
    return best.values, members.gather(1, best.indices)


def _most_recent(scores: Tensor, top_k: int) -> Tensor:
    """Places of the K best of each row `[c, N]`, the most recent of equal ones, ascending."""
    worst = scores.topk(top_k, dim=1).values[:, -1:]
    equal, above = scores == worst, scores > worst
    from_end = equal.flip(1).cumsum(1).flip(1)
    kept = above | (equal & (from_end <= top_k - above.sum(1, keepdim=True)))
    places = torch.arange(scores.shape[1], device=scores.device)
    return torch.where(kept, places, -1).topk(top_k, dim=1).values.flip(1)
