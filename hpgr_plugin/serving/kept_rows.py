"""Preference plans (Eq. 5) at serving time: anchors by one matrix product and a top-k.

`plan_preferences` scores pair by pair, so that a plan never depends on the rest of the batch. Here
a history is scored for all candidates at once. An item that is repeated gets one score, and of
equal scores the most recent still wins. The plans are the same but for items whose scores differ
by rounding only. A plan has a fixed number of slots for each candidate, some of them empty, so
that nothing is compacted; what all candidates keep alike is said once.
"""

from __future__ import annotations

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
from hpgr_plugin.ops.preference_plan.plan import PlanSettings, PreferencePlan, gaussian_kernel

# Scores at once: on a CPU what its cache holds, on a GPU what its memory does.
_CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**27}
_GROUP = 8  # scores of which only the largest is looked at first


@dataclass(frozen=True, eq=False)
class UserPlan:
    """What each of c candidates keeps of one history.

    Attributes:
        places: int64 `[c, S]`, in the history; 0 in empty slots.
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
        rows_of = inputs.history_embeddings[history]
        users.append(
            _plan_user(
                rows_of.to(torch.promote_types(rows_of.dtype, torch.float32)),
                inputs.history_ids[history],
                inputs.candidate_embeddings[rows],
                _visible(inputs, history, rows),
                settings,
            )
        )
    return ServedPlan(users, inputs.history_offsets)


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
    kernel = gaussian_kernel(settings.sigma, settings.eps, len(history)).to(history)
    recent = range(0)
    if visible is not None and len(visible):
        fewest, most = torch.stack(torch.aminmax(visible)).tolist()
        history, ids = history[:most], ids[:most]
        visible = None if fewest == most else visible
    if visible is None:
        recent = range(max(0, len(history) - settings.recent), len(history))
    if not len(history) or not len(candidates):
        places = ids.new_zeros(len(candidates), 0)
        return UserPlan(places, history.new_zeros(places.shape), recent)
    anchors = torch.cat(list(_anchors(history, ids, candidates, visible, settings.top_k)))
    return UserPlan(*_slots(anchors, visible, recent, settings, kernel), recent)


def _visible(inputs: HookInputs, history: slice, rows: slice) -> Tensor | None:
    """How many items, the first ones, each of these candidates may see, int64 `[c]`."""
    times, own = inputs.history_timestamps, inputs.candidate_timestamps
    if times is None or own is None:
        return None
    return torch.searchsorted(times[history].contiguous(), own[rows].contiguous())


def _anchors(
    history: Tensor, ids: Tensor, candidates: Tensor, visible: Tensor | None, top_k: int
) -> Iterator[Tensor]:
    """Places of the best items, int64 `[c, K]`, some candidates at a time.

    They are ascending; -1 where a candidate sees fewer than K items.
    """
    length, count = len(history), len(candidates)
    top_k = min(top_k, length)
    if top_k == 0:
        yield ids.new_zeros(count, 0)
        return
    padding = -length % _group_of_groups(length)
    columns = F.pad(history, (0, 0, 0, padding)).T
    again, origin = _repeated(ids)
    step = max(1, _CHUNK_ELEMENTS[history.device.type] // (length + padding))
    memory = history.new_empty(min(step, count), length + padding)
    for begin in range(0, count, step):
        chosen = candidates[begin : begin + step].to(history.dtype)
        seen = None if visible is None else visible[begin : begin + step]
        scores = torch.mm(chosen, columns, out=memory[: len(chosen)])
        if len(again):  # a matrix product may round equal columns differently
            scores.index_copy_(1, again, scores.index_select(1, origin))
        scores[:, length:] = -math.inf
        if seen is not None:
            hidden = torch.arange(length + padding, device=ids.device) >= seen.unsqueeze(1)
            scores.masked_fill_(hidden, -math.inf)
        yield _best(scores, length if seen is None else seen.unsqueeze(1), top_k)


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


def _best(scores: Tensor, visible: Tensor | int, top_k: int) -> Tensor:
    """Places of the best items of each row, ascending, int64 `[c, K]`; -1 where there are fewer."""
    values, places = _largest(scores, min(top_k + 1, scores.shape[1]))
    if values.shape[1] > top_k:
        # Which of equal scores are taken is not defined above.
        worst = values[:, top_k - 1]
        tied = ((worst == values[:, top_k]) & worst.isfinite()).nonzero().squeeze(1)
        places = places[:, :top_k]
        if len(tied):
            exact = _most_recent_of_equal(scores[tied], worst[tied].unsqueeze(1), top_k)
            places = places.index_copy(0, tied, exact)
    return torch.where(places < visible, places, -1).sort(1).values


def _group_of_groups(length: int) -> int:
    """What the length must be a multiple of for two rounds of groups."""
    return _GROUP * _GROUP if length > _GROUP * _GROUP else 1


def _largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest scores of each row `[c, N]`, descending, and their places, `[c, count]` both.

    The best scores lie in the groups with the largest best scores: few are sorted.
    """
    length = scores.shape[1]
    if length % _GROUP or length < 4 * _GROUP * count:
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
    return kept.nonzero()[:, 1].view(len(scores), top_k)


def _slots(
    anchors: Tensor,
    visible: Tensor | None,
    recent: range,
    settings: PlanSettings,
    kernel: Tensor,
) -> tuple[Tensor, Tensor]:
    """Places and weights `[c, S]` of the windows, and of the recent items that are not shared."""
    places, weights = _windows(anchors, kernel)
    if visible is None:
        kept = (places >= 0) & (places < recent.start)
    else:
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
    radius, far = len(kernel) - 1, 2**40
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
