"""The preference plan (Eq. 5) in plain torch, on any device."""

import math

import torch
from torch import Tensor

from hpgr_plugin.ops.jagged import complete_cumsum, ranges, segment_ids
from hpgr_plugin.ops.preference_plan.plan import (
    PlanInputs,
    PlanSettings,
    PlanTimes,
    PreferencePlan,
    gaussian_kernel,
)

# Candidates are planned in chunks of about this many numbers, so that memory stays bounded:
# on a CPU small enough for caches and the allocator to reuse it, on an accelerator large enough
# to keep it busy.
_CHUNK_ELEMENTS_CPU = 2**20
_CHUNK_ELEMENTS_ACCELERATOR = 2**26
# What one padded (candidate, item) cell costs beside its embedding, in numbers.
_CELL_ELEMENTS = 16


def plan_preferences(inputs: PlanInputs, settings: PlanSettings) -> PreferencePlan:
    """See `hpgr_plugin.ops.preference_plan.plan_preferences`; the inputs are checked."""
    dtype = torch.promote_types(inputs.history_embeddings.dtype, torch.float32)
    history, candidates = inputs.history_embeddings.to(dtype), inputs.candidate_embeddings.to(dtype)
    history_times, candidate_times = inputs.history_timestamps, inputs.candidate_timestamps
    longest = inputs.max_history or 0
    kernel = gaussian_kernel(settings.sigma, settings.eps, longest).to(history)
    users = segment_ids(inputs.candidate_offsets, len(candidates))
    starts = inputs.history_offsets.long()[users]
    lengths = inputs.history_offsets.long().diff()[users]

    cell = history.shape[1] + _CELL_ELEMENTS
    on_cpu = history.device.type == "cpu"
    elements = _CHUNK_ELEMENTS_CPU if on_cpu else _CHUNK_ELEMENTS_ACCELERATOR
    chunk = max(1, elements // (cell * max(1, longest)))
    parts = []
    for first in range(0, len(candidates), chunk):
        rows = slice(first, first + chunk)
        scores, visible = _padded_scores(
            history,
            candidates[rows],
            starts[rows],
            lengths[rows],
            history_times,
            None if candidate_times is None else candidate_times[rows],
        )
        weights = _column_weights(scores, visible, settings.top_k, settings.recent, kernel)
        parts.append(_kept(weights, starts[rows]))
    if not parts:
        index = starts.new_empty(0)
        return PreferencePlan(index, kernel.new_empty(0), starts.new_zeros(1))
    index, weights, counts = (torch.cat(column) for column in zip(*parts, strict=True))
    return PreferencePlan(index, weights, complete_cumsum(counts))


def count_earlier(times: PlanTimes) -> Tensor:
    """See the operator: a binary search in all rows at once."""
    if len(times.history_offsets) == 2:
        return torch.searchsorted(times.history.contiguous(), times.candidates.contiguous())
    users = segment_ids(times.candidate_offsets, len(times.candidates))
    start = times.history_offsets[:-1].long()[users]
    low, high = start, times.history_offsets[1:].long()[users]
    # One step too many changes nothing, so an upper bound of the lengths will do.
    last = max(0, len(times.history) - 1)
    for _ in range(times.max_history.bit_length()):
        middle = (low + high) // 2
        before = times.history[middle.clamp(max=last)] < times.candidates
        open_ = low < high
        low = torch.where(open_ & before, middle + 1, low)
        high = torch.where(open_ & ~before, middle, high)
    return low - start


def _padded_scores(
    history: Tensor,
    candidates: Tensor,
    starts: Tensor,
    lengths: Tensor,
    history_times: Tensor | None,
    candidate_times: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Scores e_C . e_i of c candidates with their users' items, and visibility, `[c, N]`."""
    rows = ranges(starts, lengths)
    owner = torch.arange(len(starts), device=starts.device).repeat_interleave(
        lengths, output_size=len(rows)
    )
    # Not a matrix product: its blocking may round two equal items differently, which would break
    # ties and make a plan depend on the rest of the batch.
    pair_scores = (history.index_select(0, rows) * candidates.index_select(0, owner)).sum(1)
    longest = int(lengths.max())
    places = rows - starts[owner]
    scores = pair_scores.new_full((len(starts), longest), -math.inf)
    visible = torch.zeros_like(scores, dtype=torch.bool)
    seen = torch.ones_like(rows, dtype=torch.bool)
    if history_times is not None and candidate_times is not None:
        seen = history_times[rows] < candidate_times[owner]
    visible[owner, places] = seen
    scores[owner, places] = pair_scores.masked_fill(~seen, -math.inf)
    return scores, visible


def _column_weights(
    scores: Tensor, visible: Tensor, top_k: int, recent: int, kernel: Tensor
) -> Tensor:
    """M_j `[c, N]`, 0 where nothing is kept."""
    distance = _nearest_anchor(_anchors(scores, visible, top_k))
    within = visible & (distance < len(kernel))
    weights = torch.where(within, kernel[distance.clamp(max=len(kernel) - 1)], 0.0)
    newest = visible & (_count_from_end(visible) <= recent)
    return weights.masked_fill(newest, 1.0)


def _anchors(scores: Tensor, visible: Tensor, top_k: int) -> Tensor:
    """The top-K visible items of each row, `[c, N]` bool; of equal scores the most recent."""
    top_k = min(top_k, scores.shape[1])
    if top_k == 0:
        return torch.zeros_like(visible)
    # Only the K-th value is taken from topk, which does not define the order of equal items.
    smallest = scores.topk(top_k, dim=1, sorted=True).values[:, -1:]
    above = visible & (scores > smallest)
    tied = visible & (scores == smallest)
    places_left = top_k - above.sum(1, keepdim=True)
    return above | (tied & (_count_from_end(tied) <= places_left))


def _count_from_end(mask: Tensor) -> Tensor:
    """How many of the row's True lie at each place or later, `[c, N]`."""
    return mask.flip(1).cumsum(1).flip(1)


def _nearest_anchor(anchors: Tensor) -> Tensor:
    """Distance to the nearest anchor by two running scans, `[c, N]` int64, O(N) per row."""
    longest = anchors.shape[1]
    places = torch.arange(longest, device=anchors.device).expand_as(anchors)
    far = 2 * longest + 1
    if longest == 0:
        return places
    before = torch.where(anchors, places, -far).cummax(1).values
    after = torch.where(anchors, places, far + longest).flip(1).cummin(1).values.flip(1)
    return torch.minimum(places - before, after - places)


def _kept(weights: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """CSR of the non-zero weights: flat history index, weight, count per row."""
    row, place = weights.nonzero(as_tuple=True)
    return starts[row] + place, weights[row, place], (weights > 0).sum(1)
