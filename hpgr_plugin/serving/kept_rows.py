"""Preference plans (Eq. 5) at serving time, from the anchors that one matrix product gives.

A plan has a fixed number of slots for each candidate, some of them empty, so that nothing is
compacted; what all candidates keep alike is said once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
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
from hpgr_plugin.serving.anchors import ScoredHistory

_FAR = 2**40

Window = tuple[Tensor, Tensor]  # places from an anchor, int64 `[2r + 1]`, and their weights


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
    recent = recent_items(settings, len(history)) if visible is None else range(0)
    chosen = recent.start if visible is None else len(history)  # of so many items
    if not chosen or not len(candidates) or (visible is None and not settings.top_k):
        places = ids.new_zeros(len(candidates), 0)
        return UserPlan(places, scored.rows.new_zeros(places.shape), recent)
    anchors, tied = scored.anchors(candidates, visible, settings.top_k)
    anchors = scored.exact(candidates, visible, anchors, tied)
    if visible is None:
        last = anchors.new_full((), recent.start - 1)
        window = window_of(settings, len(history), scored.rows)
        return UserPlan(*window_slots(anchors, last, window), recent)
    kernel = gaussian_kernel(settings.sigma, settings.eps, len(history)).to(scored.rows)
    return UserPlan(*_slots(anchors, visible, settings, kernel), range(0))


def recent_items(settings: PlanSettings, length: int) -> range:
    """Places of the last items, which all candidates keep that see the whole history."""
    return range(max(0, length - settings.recent), length)


def keeps_all(settings: PlanSettings, length: int) -> bool:
    """Whether every item of a history is an anchor or recent, and so has weight 1."""
    return length <= max(settings.top_k, settings.recent)


def _visible(inputs: HookInputs, history: slice, rows: slice) -> Tensor | None:
    """How many items, the first ones, each of these candidates may see, int64 `[c]`."""
    times, own = inputs.history_timestamps, inputs.candidate_timestamps
    if times is None or own is None:
        return None
    return torch.searchsorted(times[history].contiguous(), own[rows].contiguous())


@functools.lru_cache(maxsize=64)
def _kernel_of(
    sigma: float, eps: float, longest: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    kernel = gaussian_kernel(sigma, eps, longest).to(device, dtype)
    shift = torch.arange(1 - len(kernel), len(kernel), device=device)
    return shift, kernel[shift.abs()]


def window_of(settings: PlanSettings, length: int, like: Tensor) -> Window:
    """The window of anchors in a history of so many items or less; weights as `like`."""
    longest = min(length, kernel_length(settings.sigma, settings.eps))
    return _kernel_of(settings.sigma, settings.eps, longest, like.dtype, like.device)


@functools.cache
def _edges(device: torch.device) -> tuple[Tensor, Tensor]:
    """Anchors far before and far behind every history."""
    return torch.tensor(-_FAR, device=device), torch.tensor(_FAR, device=device)


def window_slots(anchors: Tensor, end: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Places and weights `[c, K * (2r + 1)]` of windows, each place under its nearest anchor.

    Args:
        anchors: int64 `[c, K]`, ascending, none of them -1.
        end: int64 `[]`, the last place that may be in a window, at least 0.
        window: of all anchors.
    """
    shift, kernel = window
    begin, behind = _edges(anchors.device)
    around = torch.cat([begin.expand(len(anchors), 1), anchors, behind.expand(len(anchors), 1)], 1)
    # The last place of each anchor; between two of them it is the earlier one's.
    middle = torch.minimum((around[:, 1:] + around[:, :-1]) >> 1, end).clamp_(min=-1)
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
