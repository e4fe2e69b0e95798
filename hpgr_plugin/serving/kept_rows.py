"""Preference plans (Eq. 5) at serving time: anchors by one matrix product and a top-k.

`plan_preferences` scores pair by pair, so that a plan never depends on the rest of the batch. Here
a history is scored for all candidates at once. An item that is repeated gets one score, and of
equal scores the most recent still wins. The plans are the same but for items whose scores differ
by rounding only. A plan has a fixed number of slots for each candidate, some of them empty, so
that nothing is compacted; what all candidates keep alike is said once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from hpgr_plugin.components.attention_hooks import (
    AttentionHook,
    HookInputs,
    PreferenceGuidedSparseAttention,
)
from hpgr_plugin.ops.jagged import complete_cumsum, jagged_to_padded_dense
from hpgr_plugin.ops.preference_plan.plan import (
    PlanSettings,
    PreferencePlan,
    gaussian_kernel,
    kernel_length,
)

# Scores at once: on a CPU what its cache holds, on a GPU what its memory does.
_CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**27}
_FEW_SCORES = {"cpu": 2**15, "cuda": 2**22}  # of which the largest are looked for at once
_FAR = 2**40
_GROUP = 8  # scores of which only the largest is looked at first


@dataclass(frozen=True, eq=False)
class UserPlan:
    """What each of c candidates keeps of one history.

    Attributes:
        places: int64 `[c, S]`, in the history; any place in empty slots.
        weights: `[c, S]`, M_j; 0 in empty slots. A row has no place twice but for empty slots.
        recent: places that every candidate keeps with weight 1 beside its slots.
    """

    places: Tensor
    weights: Tensor
    recent: range

    @classmethod
    def of(cls, plan: PreferencePlan, rows: slice, first: Tensor) -> UserPlan:
        """Of some rows of a plan, those of one user, whose history begins at `first`."""
        offsets = plan.offsets[rows.start : rows.stop + 1]
        begin, end = int(offsets[0]), int(offsets[-1])
        most = int(offsets.diff().max()) if len(offsets) > 1 else 0
        places = (plan.index[begin:end].long() - first).unsqueeze(1)
        weights = plan.weights[begin:end].unsqueeze(1)
        return cls(
            jagged_to_padded_dense(places, offsets - begin, most).squeeze(2),
            jagged_to_padded_dense(weights, offsets - begin, most).squeeze(2),
            range(0),
        )

    def compact(self) -> tuple[Tensor, Tensor, Tensor]:
        """Places and weights `[P]`, ascending in each row, and how many each candidate has."""
        newest = torch.tensor(self.recent, dtype=torch.int64, device=self.places.device)
        newest = newest.expand(len(self.places), -1)
        places = torch.cat([self.places, newest], 1)
        weights = torch.cat([self.weights, self.weights.new_ones(newest.shape)], 1)
        order = places.argsort(1)
        places, weights = places.gather(1, order), weights.gather(1, order)
        kept = weights > 0
        return places[kept], weights[kept], kept.sum(1)


@dataclass(frozen=True, eq=False)
class ServedPlan:
    """The plans of a batch, user by user.

    Attributes:
        users: one each.
        history_offsets: `[B + 1]`.
    """

    users: Sequence[UserPlan]
    history_offsets: Tensor

    def compact(self) -> PreferencePlan:
        """The same as `plan_preferences` gives it."""
        device = self.history_offsets.device
        index, weights = (
            [torch.zeros(0, dtype=torch.int64, device=device)],
            [torch.zeros(0, device=device)],
        )
        counts = [index[0]]
        for user, first in zip(self.users, self.history_offsets[:-1], strict=True):
            places, kept, count = user.compact()
            index.append(places + first)
            weights.append(kept)
            counts.append(count)
        return PreferencePlan(
            torch.cat(index), torch.cat(weights), complete_cumsum(torch.cat(counts))
        )


class ServedPreferences(AttentionHook):
    """Plans as the hook of the trained model does, faster for many candidates of one history.

    Args:
        hook: of the trained model.
    """

    def __init__(self, hook: PreferenceGuidedSparseAttention) -> None:
        super().__init__()
        self.hook = hook
        self.layout = hook.layout
        self.mask_position = hook.mask_position

    @torch.no_grad()
    def plan(self, inputs: HookInputs) -> PreferencePlan | ServedPlan:  # type: ignore[override]
        """See `PreferenceGuidedSparseAttention.plan`; a `ServedPlan` where plans are made here."""
        hook = self.hook
        if not can_plan(hook) or inputs.history_ids is None or inputs.candidate_ids is None:
            return hook.plan(inputs)
        plan = plan_histories(hook.scored(inputs), hook.settings)
        return plan if self.layout == "shared_history" else plan.compact()


def can_plan(hook: AttentionHook | None) -> bool:
    """Whether plans of this hook are made here: those of PGSA itself, not of a subclass."""
    return type(hook) is PreferenceGuidedSparseAttention


def plan_histories(inputs: HookInputs, settings: PlanSettings) -> ServedPlan:
    """The plan of all candidates; arguments as in `plan_preferences`, with ids."""
    assert inputs.history_ids is not None
    bounds = zip(
        pairwise(inputs.history_offsets.tolist()),
        pairwise(inputs.candidate_offsets.tolist()),
        strict=True,
    )
    users = []
    for (first, last), (start, end) in bounds:
        history, rows = slice(first, last), slice(start, end)
        users.append(
            _plan_user(
                inputs.history_embeddings[history],
                inputs.history_ids[history],
                inputs.candidate_embeddings[rows],
                _visible(inputs, history, rows),
                settings,
            )
        )
    return ServedPlan(users, inputs.history_offsets)


@dataclass(frozen=True, eq=False)
class ScoredHistory:
    """What chooses the anchors in one history of N items.

    Attributes:
        rows: `[N + padding, D]`, the embeddings that are scored, float32 at least; 0 in padding.
        again: int64 `[R]`, places of the items that occur earlier in the history too.
        origin: int64 `[R]`, where each of them occurs first.
        length: N.
    """

    rows: Tensor
    again: Tensor
    origin: Tensor
    length: int

    @classmethod
    def of(cls, rows: Tensor, ids: Tensor) -> ScoredHistory:
        """Of the scored embeddings `[N, D]` of these items `[N]`."""
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        padding = -len(rows) % _group_of_groups(len(rows))
        return cls(F.pad(rows, (0, 0, 0, padding)), *_repeated(ids), len(rows))

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors."""
        return self.rows.nbytes + self.again.nbytes + self.origin.nbytes

    def recent(self, settings: PlanSettings) -> range:
        """Places of the last items, which every candidate keeps where all see the history whole."""
        return range(max(0, self.length - settings.recent), self.length)

    def plan(self, candidates: Tensor, settings: PlanSettings) -> UserPlan:
        """The plan of candidates `[c, D]` that see all items."""
        recent = self.recent(settings)
        if not recent.start or not settings.top_k or not len(candidates):
            places = self.again.new_zeros(len(candidates), 0)
            return UserPlan(places, self.rows.new_zeros(places.shape), recent)
        shift, kernel = _kernel(settings, self.length, self.rows)
        anchors = self.anchors(candidates, None, settings.top_k)
        return UserPlan(*_whole_slots(anchors, recent.start, shift, kernel), recent)

    def anchors(self, candidates: Tensor, visible: Tensor | None, top_k: int) -> Tensor:
        """Places of the best items, ascending, int64 `[c, K]`, K items at most.

        Args:
            candidates: `[c, D]`.
            visible: int64 `[c]`, how many items each sees; -1 stands where these are fewer than K.
                None: all.
            top_k: K.
        """
        parts = list(self._anchors(candidates, visible, min(top_k, self.length)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _anchors(self, candidates: Tensor, visible: Tensor | None, top_k: int) -> Iterator[Tensor]:
        """See `anchors`, some candidates at a time."""
        count, (padded, _) = len(candidates), self.rows.shape
        if top_k == 0:
            yield self.again.new_zeros(count, 0)
            return
        step = max(1, _CHUNK_ELEMENTS[self.rows.device.type] // padded)
        memory = self.rows.new_empty(step, padded) if step < count else None
        for begin in range(0, count, step):
            chosen = candidates[begin : begin + step].to(self.rows.dtype)
            scores = torch.mm(
                chosen, self.rows.T, out=None if memory is None else memory[: len(chosen)]
            )
            if len(self.again):  # a matrix product may round equal columns differently
                scores.index_copy_(1, self.again, scores.index_select(1, self.origin))
            if padded > self.length:
                scores[:, self.length :] = -math.inf
            seen = None
            if visible is not None:
                seen = visible[begin : begin + step].unsqueeze(1)
                hidden = torch.arange(padded, device=scores.device) >= seen
                scores.masked_fill_(hidden, -math.inf)
            yield _best(scores, seen, top_k)


def _plan_user(
    history: Tensor, ids: Tensor, candidates: Tensor, visible: Tensor | None, settings: PlanSettings
) -> UserPlan:
    """The plan of one user.

    Args:
        history: `[N, D]`.
        ids: int64 `[N]`.
        candidates: `[c, D]`.
        visible: int64 `[c]`, how many items each may see, the first ones; None: all of them.
        settings: of the plan.
    """
    if visible is not None and len(visible):
        fewest, most = torch.stack(torch.aminmax(visible)).tolist()
        history, ids = history[:most], ids[:most]
        visible = None if fewest == most else visible
    scored = ScoredHistory.of(history, ids)
    if visible is None:
        return scored.plan(candidates, settings)
    if not len(history) or not len(candidates):
        places = ids.new_zeros(len(candidates), 0)
        return UserPlan(places, scored.rows.new_zeros(places.shape), range(0))
    kernel = gaussian_kernel(settings.sigma, settings.eps, len(history)).to(scored.rows)
    anchors = scored.anchors(candidates, visible, settings.top_k)
    return UserPlan(*_slots(anchors, visible, settings, kernel), range(0))


def _visible(inputs: HookInputs, history: slice, rows: slice) -> Tensor | None:
    """How many items, the first ones, each of these candidates may see, int64 `[c]`."""
    times, own = inputs.history_timestamps, inputs.candidate_timestamps
    if times is None or own is None:
        return None
    return torch.searchsorted(times[history].contiguous(), own[rows].contiguous())


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


def _best(scores: Tensor, visible: Tensor | None, top_k: int) -> Tensor:
    """Places of the best items of each row, ascending, int64 `[c, K]`.

    Args:
        scores: `[c, N]`.
        visible: int64 `[c, 1]`; -1 stands where these are fewer than K. None: K or more are finite.
        top_k: K.
    """
    values, places = _largest(scores, min(top_k + 1, scores.shape[1]))
    if values.shape[1] > top_k:
        # Which of equal scores are taken is not defined above.
        places, worst = places[:, :top_k], values[:, top_k - 1]
        equal = worst == values[:, top_k]
        if visible is not None:
            equal &= worst.isfinite()
        if equal.any():
            tied = equal.nonzero().squeeze(1)
            exact = _most_recent_of_equal(scores[tied], worst[tied].unsqueeze(1), top_k)
            places = places.index_copy(0, tied, exact)
    if visible is not None:
        places = torch.where(places < visible, places, -1)
    return places.sort(1).values


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


def _most_recent_of_equal(scores: Tensor, worst: Tensor, top_k: int) -> Tensor:
    """Places of the K best of each row `[c, N]`, of which the worst has several equals."""
    equal = scores == worst
    above = scores > worst
    from_end = equal.flip(1).cumsum(1).flip(1)
    kept = above | (equal & (from_end <= top_k - above.sum(1, keepdim=True)))
    places = torch.arange(scores.shape[1], device=scores.device)
    return torch.where(kept, places, -1).topk(top_k, dim=1).values


@functools.lru_cache(maxsize=64)
def _kernel_of(
    sigma: float, eps: float, longest: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    kernel = gaussian_kernel(sigma, eps, longest).to(device, dtype)
    shift = torch.arange(1 - len(kernel), len(kernel), device=device)
    return shift, kernel[shift.abs()]


def _kernel(settings: PlanSettings, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Places of a window from its anchor, int64 `[2r + 1]`, and their weights."""
    longest = min(length, kernel_length(settings.sigma, settings.eps))
    return _kernel_of(settings.sigma, settings.eps, longest, like.dtype, like.device)


@functools.lru_cache(maxsize=8)
def _edges(device: torch.device) -> tuple[Tensor, Tensor]:
    """Anchors far before and far behind every history."""
    return torch.tensor(-_FAR, device=device), torch.tensor(_FAR, device=device)


def _whole_slots(anchors: Tensor, end: int, shift: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Places and weights `[c, K * (2r + 1)]` of windows, each place under its nearest anchor.

    Args:
        anchors: int64 `[c, K]`, ascending, none of them -1.
        end: places from here on are in no window; above 0.
        shift, kernel: see `_kernel`.
    """
    begin, behind = _edges(anchors.device)
    around = torch.cat([begin.expand(len(anchors), 1), anchors, behind.expand(len(anchors), 1)], 1)
    # The last place of each anchor; between two of them it is the earlier one's.
    middle = ((around[:, 1:] + around[:, :-1]) >> 1).clamp_(-1, end - 1)
    first, last = middle[:, :-1] + 1, middle[:, 1:]
    # Of an anchor whose own places begin behind the end, nothing is left.
    wanted = torch.where(first > last, _FAR, anchors).unsqueeze(2) + shift
    places = wanted.clamp(first.unsqueeze(2), last.unsqueeze(2))
    weights = torch.where(places == wanted, kernel, 0.0)
    return places.flatten(1), weights.flatten(1)


def _slots(
    anchors: Tensor, visible: Tensor, settings: PlanSettings, kernel: Tensor
) -> tuple[Tensor, Tensor]:
    """Places and weights `[c, S]` of the windows, and of the recent items of each candidate."""
    places, weights = _windows(anchors, kernel)
    newest = (visible - settings.recent).clamp(min=0).unsqueeze(1)
    kept = (places >= 0) & (places < newest)
    if settings.recent:
        own = newest + torch.arange(settings.recent, device=places.device)
        places = torch.cat([places, own], 1)
        weights = torch.cat([weights, weights.new_ones(own.shape)], 1)
        kept = torch.cat([kept, own < visible.unsqueeze(1)], 1)
    kept &= weights > 0
    return torch.where(kept, places, 0), torch.where(kept, weights, 0.0)


def _windows(anchors: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """The places around ascending anchors, each under its nearest one: `[c, K * (2r + 1)]` both.

    Weights are 0 for places that belong to another anchor's window or to no anchor.
    """
    radius, far = len(kernel) - 1, _FAR
    shift = torch.arange(-radius, radius + 1, device=anchors.device)
    places = anchors.unsqueeze(2) + shift
    there = anchors >= 0
    before = torch.where(there, anchors, -far).roll(1, 1)
    after = torch.where(there, anchors, far).roll(-1, 1)
    if anchors.shape[1]:
        before[:, 0], after[:, -1] = -far, far
    twice = 2 * places
    own = (twice > (anchors + before).unsqueeze(2)) & (twice <= (anchors + after).unsqueeze(2))
    weights = torch.where(own & there.unsqueeze(2), kernel[shift.abs()], 0.0)
    return places.flatten(1), weights.flatten(1)
