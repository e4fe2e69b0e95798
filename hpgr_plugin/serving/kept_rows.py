"""Preference plans (Eq. 5) at serving time: anchors by one matrix product and a top-k.

`plan_preferences` scores pair by pair, so that a plan never depends on the rest of the batch. Here
a history is scored for all candidates at once. An item that is repeated gets one score, and of
equal scores the most recent still wins. The plans are the same but for items whose scores differ
by rounding only.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from hpgr_plugin.components.attention_hooks import (
    AttentionHook,
    HookInputs,
    PreferenceGuidedSparseAttention,
)
from hpgr_plugin.ops.jagged import complete_cumsum
from hpgr_plugin.ops.preference_plan.plan import PlanSettings, PreferencePlan, gaussian_kernel

_CHUNK_ELEMENTS = 2**22  # scores at once


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
    def plan(self, inputs: HookInputs) -> PreferencePlan:
        """See `PreferenceGuidedSparseAttention.plan`."""
        hook = self.hook
        if not can_plan(hook) or inputs.history_ids is None or inputs.candidate_ids is None:
            return hook.plan(inputs)
        return plan_histories(hook.scored(inputs), hook.settings)


def can_plan(hook: AttentionHook | None) -> bool:
    """Whether plans of this hook are made here: those of PGSA itself, not of a subclass."""
    return type(hook) is PreferenceGuidedSparseAttention


def plan_histories(inputs: HookInputs, settings: PlanSettings) -> PreferencePlan:
    """The plan of all candidates; arguments as in `plan_preferences`, with ids."""
    assert inputs.history_ids is not None
    index, weights, counts = [], [], []
    users = zip(
        pairwise(inputs.history_offsets.tolist()),
        pairwise(inputs.candidate_offsets.tolist()),
        strict=True,
    )
    for (first, last), (start, end) in users:
        length = last - first
        step = max(1, _CHUNK_ELEMENTS // max(1, length))
        history = inputs.history_embeddings[first:last]
        history = history.to(torch.promote_types(history.dtype, torch.float32))
        again, origin = _repeated(inputs.history_ids[first:last])
        kernel = gaussian_kernel(settings.sigma, settings.eps, length).to(history)
        for begin in range(start, end, step):
            rows = slice(begin, min(begin + step, end))
            scores = inputs.candidate_embeddings[rows].to(history.dtype) @ history.T
            if len(again):  # a matrix product may round equal columns differently
                scores.index_copy_(1, again, scores.index_select(1, origin))
            kept = _kept_of(scores, _visible(inputs, first, last, rows), settings, kernel)
            index.append(kept[0] + first)
            weights.append(kept[1])
            counts.append(kept[2])
    device = inputs.history_offsets.device
    if not counts:
        none = torch.zeros(0, dtype=torch.int64, device=device)
        return PreferencePlan(none, none.float(), none.new_zeros(1))
    return PreferencePlan(torch.cat(index), torch.cat(weights), complete_cumsum(torch.cat(counts)))


def _repeated(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the items that occur earlier in the history too, and where each occurs."""
    distinct, group = ids.unique(return_inverse=True)
    places = torch.arange(len(ids), device=ids.device)
    if len(distinct) == len(ids):
        return places[:0], places[:0]
    first = torch.full_like(distinct, len(ids)).scatter_reduce_(0, group, places, "amin")[group]
    again = (first != places).nonzero().squeeze(1)
    return again, first[again]


def _visible(inputs: HookInputs, first: int, last: int, rows: slice) -> Tensor:
    """How many items, the first ones, each of these candidates may see, int64 `[c]`."""
    times, own = inputs.history_timestamps, inputs.candidate_timestamps
    count = inputs.candidate_embeddings[rows].shape[0]
    if times is None or own is None:
        return torch.full((count,), last - first, device=inputs.history_offsets.device)
    return torch.searchsorted(times[first:last].contiguous(), own[rows].contiguous())


def _kept_of(
    scores: Tensor, visible: Tensor, settings: PlanSettings, kernel: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Places in the history, weights, and how many of each candidate, from scores `[c, N]`."""
    anchors = _anchors(scores, visible, settings.top_k)
    places, weights = _windows(anchors, kernel)
    newest = (visible - settings.recent).clamp(min=0).unsqueeze(1)
    kept = (places >= 0) & (places < newest) & (weights > 0)
    if settings.recent:
        recent = newest + torch.arange(settings.recent, device=scores.device)
        places = torch.cat([places, recent], 1)
        weights = torch.cat([weights, weights.new_ones(recent.shape)], 1)
        kept = torch.cat([kept, recent < visible.unsqueeze(1)], 1)
    return places[kept], weights[kept], kept.sum(1)


def _anchors(scores: Tensor, visible: Tensor, top_k: int) -> Tensor:
    """Places of the best items of each row, ascending, int64 `[c, K]`; -1 where there are fewer."""
    count, length = scores.shape
    top_k = min(top_k, length)
    if top_k == 0:
        return visible.new_empty(count, 0)
    if bool((visible < length).any()):
        hidden = torch.arange(length, device=scores.device) >= visible.unsqueeze(1)
        scores = scores.masked_fill(hidden, -math.inf)
    best = scores.topk(min(top_k + 1, length), dim=1, sorted=True)
    places = best.indices[:, :top_k]
    if best.values.shape[1] > top_k:
        # topk does not define which of equal scores it takes.
        worst = best.values[:, top_k - 1]
        tied = ((worst == best.values[:, top_k]) & worst.isfinite()).nonzero().squeeze(1)
        if len(tied):
            exact = _most_recent_of_equal(scores[tied], worst[tied].unsqueeze(1), top_k)
            places = places.index_copy(0, tied, exact)
    return torch.where(places < visible.unsqueeze(1), places, -1).sort(1).values


def _most_recent_of_equal(scores: Tensor, worst: Tensor, top_k: int) -> Tensor:
    """Places of the K best of each row `[c, N]`, of which the worst has several equals."""
    equal = scores == worst
    above = scores > worst
    from_end = equal.flip(1).cumsum(1).flip(1)
    kept = above | (equal & (from_end <= top_k - above.sum(1, keepdim=True)))
    return kept.nonzero()[:, 1].view(len(scores), top_k)


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
