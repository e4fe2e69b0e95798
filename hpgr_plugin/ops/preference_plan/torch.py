"""Which history tokens a candidate keeps, and with what weight: the plan of PGSA (Eq. 5)."""

import math

import torch
from torch import Tensor

from hpgr_plugin.ops.dispatch import triton_is_installed, warn_once
from hpgr_plugin.ops.jagged import complete_cumsum, ranges, segment_ids
from hpgr_plugin.ops.preference_plan.plan import PreferencePlan, gaussian_kernel

# Candidates are planned in chunks of about this many numbers, so that memory stays bounded:
# on a CPU so little that caches and the allocator reuse it, on an accelerator enough to keep it
# busy.
_CHUNK_ELEMENTS_CPU = 2**20
_CHUNK_ELEMENTS_ACCELERATOR = 2**26
# What one padded (candidate, item) cell costs beside its embedding, in numbers.
_CELL_ELEMENTS = 16


@torch.no_grad()
def plan_preferences(
    history_embeddings: Tensor,
    candidate_embeddings: Tensor,
    history_offsets: Tensor,
    candidate_offsets: Tensor,
    top_k: int = 50,
    sigma: float = 2.0,
    eps: float = 1e-3,
    recent: int = 0,
    history_timestamps: Tensor | None = None,
    candidate_timestamps: Tensor | None = None,
) -> PreferencePlan:
    """Anchors by preference, a Gaussian around each, everything else dropped (Eq. 5).

    For candidate C the `top_k` visible items with the largest e_C . e_i are anchors, ties going
    to the most recent. M_j = exp(-d_j^2 / (2 sigma^2)), d_j being the distance from j to the
    nearest anchor in positions of the user's own history; items with M_j < eps are dropped. The
    `recent` most recent visible items are kept with weight 1 and spread no Gaussian. No gradient
    goes through the selection. A candidate's plan depends on its own user alone, whatever else
    is in the batch.

    Args:
        history_embeddings: `[T, D]`; half precision is scored in float32.
        candidate_embeddings: `[C, D]`.
        history_offsets: `[B + 1]`, histories of the users, oldest item first.
        candidate_offsets: `[B + 1]`, candidates of the same users.
        top_k: K, at least 0.
        sigma: width of the Gaussian in positions, above 0.
        eps: smallest weight kept, in (0, 1].
        recent: r, at least 0.
        history_timestamps: `[T]`. With `candidate_timestamps` given too, an item with
            t_i >= t_C is hidden from C: neither anchor, nor recent, nor kept.
        candidate_timestamps: `[C]`, in the same unit.

    Returns:
        One row per candidate, weights float64 where the history embeddings are float64, else
        float32.

    Raises:
        ValueError: an argument out of its range, or shapes that do not match.
    """
    check_plan_settings(top_k=top_k, sigma=sigma, eps=eps, recent=recent)
    num_items, num_candidates = len(history_embeddings), len(candidate_embeddings)
    _check_embeddings(history_embeddings, candidate_embeddings)
    _check_timestamps(history_timestamps, candidate_timestamps, num_items, num_candidates)
    longest = _check_offsets(history_offsets, candidate_offsets, num_items, num_candidates)

    if history_embeddings.is_cuda:
        plan = plan_with_kernels(
            history_embeddings,
            candidate_embeddings,
            history_offsets,
            candidate_offsets,
            top_k=top_k,
            sigma=sigma,
            eps=eps,
            recent=recent,
            history_timestamps=history_timestamps,
            candidate_timestamps=candidate_timestamps,
            max_history=longest,
        )
        if plan is not None:
            return plan
    scored_dtype = torch.promote_types(history_embeddings.dtype, torch.float32)
    history_embeddings = history_embeddings.to(scored_dtype)
    candidate_embeddings = candidate_embeddings.to(scored_dtype)
    kernel = gaussian_kernel(sigma, eps, longest).to(history_embeddings)
    users = segment_ids(candidate_offsets, num_candidates)
    starts = history_offsets.long()[users]
    lengths = history_offsets.long().diff()[users]

    cell = history_embeddings.shape[1] + _CELL_ELEMENTS
    on_cpu = history_embeddings.device.type == "cpu"
    elements = _CHUNK_ELEMENTS_CPU if on_cpu else _CHUNK_ELEMENTS_ACCELERATOR
    chunk = max(1, elements // (cell * max(1, longest)))
    parts = []
    for first in range(0, num_candidates, chunk):
        rows = slice(first, first + chunk)
        scores, visible = _padded_scores(
            history_embeddings,
            candidate_embeddings[rows],
            starts[rows],
            lengths[rows],
            history_timestamps,
            None if candidate_timestamps is None else candidate_timestamps[rows],
        )
        weights = _column_weights(scores, visible, top_k, recent, kernel)
        parts.append(_kept(weights, starts[rows]))
    if not parts:
        index = starts.new_empty(0)
        return PreferencePlan(index, kernel.new_empty(0), starts.new_zeros(1))
    index, weights, counts = (torch.cat(column) for column in zip(*parts, strict=True))
    return PreferencePlan(index, weights, complete_cumsum(counts))


def check_plan_settings(*, top_k: int, sigma: float, eps: float, recent: int) -> None:
    """Raises `ValueError` naming the first setting out of its range."""
    for name, value in (("top_k", top_k), ("recent", recent)):
        if value < 0 or value != int(value):
            raise ValueError(f"{name} must be an integer of at least 0, got {value}")
    if not (0.0 < sigma < math.inf):
        raise ValueError(f"sigma must be a finite number above 0, got {sigma}")
    if not 0.0 < eps <= 1.0:
        raise ValueError(f"eps must be in (0, 1], got {eps}")


def plan_with_kernels(
    history_embeddings: Tensor,
    candidate_embeddings: Tensor,
    history_offsets: Tensor,
    candidate_offsets: Tensor,
    *,
    top_k: int,
    sigma: float,
    eps: float,
    recent: int,
    history_timestamps: Tensor | None,
    candidate_timestamps: Tensor | None,
    max_history: int,
) -> PreferencePlan | None:
    """`plan_preferences` of CUDA tensors by the kernels; None, said once, where they cannot.

    Args:
        max_history: the length of the longest history.
    """
    if not triton_is_installed():
        warn_once("plans are made in plain torch: triton is not installed")
        return None
    from hpgr_plugin.ops.preference_plan import triton as plan

    if candidate_embeddings.dtype != history_embeddings.dtype:
        history_embeddings = history_embeddings.float()
        candidate_embeddings = candidate_embeddings.float()
    reason = plan.why_not(
        history_embeddings, top_k=top_k, sigma=sigma, eps=eps, max_history=max_history
    )
    if reason is not None:
        warn_once(f"plans are made in plain torch: {reason}")
        return None
    counts = candidate_offsets.diff()
    return plan.plan_preferences(
        history_embeddings,
        candidate_embeddings,
        history_offsets,
        candidate_offsets,
        top_k=top_k,
        sigma=sigma,
        eps=eps,
        recent=recent,
        history_timestamps=history_timestamps,
        candidate_timestamps=candidate_timestamps,
        max_history=max_history,
        max_candidates=int(counts.max()) if len(counts) else 0,
    )


def _padded_scores(
    history: Tensor,
    candidates: Tensor,
    starts: Tensor,
    lengths: Tensor,
    history_times: Tensor | None,
    candidate_times: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """e_C . e_i of c candidates with their users' items: scores and visibility, `[c, N]`."""
    rows = ranges(starts, lengths)
    owner = torch.arange(len(starts), device=starts.device).repeat_interleave(
        lengths, output_size=len(rows)
    )
    # Not a matrix product: its blocking may round two equal items differently, and then a tie
    # is no tie, and a plan depends on what else is in the batch.
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
    """The top-K visible items of each row, `[c, N]` bool; ties go to the most recent."""
    top_k = min(top_k, scores.shape[1])
    if top_k == 0:
        return torch.zeros_like(visible)
    # Only the K-th value is taken from topk: which of equal items it returns is not defined.
    smallest = scores.topk(top_k, dim=1, sorted=True).values[:, -1:]
    above = visible & (scores > smallest)
    tied = visible & (scores == smallest)
    places_left = top_k - above.sum(1, keepdim=True)
    return above | (tied & (_count_from_end(tied) <= places_left))


def _count_from_end(mask: Tensor) -> Tensor:
    """How many of the row's True lie at each place or later, `[c, N]`."""
    return mask.flip(1).cumsum(1).flip(1)


def _nearest_anchor(anchors: Tensor) -> Tensor:
    """Distance to the nearest anchor by two running scans, `[c, N]` int64, O(N) a row."""
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


def _check_embeddings(history: Tensor, candidates: Tensor) -> None:
    if history.dim() != 2 or candidates.dim() != 2 or history.shape[1] != candidates.shape[1]:
        raise ValueError(
            "history_embeddings [T, D] and candidate_embeddings [C, D] must share D, got "
            f"{list(history.shape)} and {list(candidates.shape)}"
        )


def _check_timestamps(
    history: Tensor | None, candidates: Tensor | None, num_items: int, num_candidates: int
) -> None:
    if (history is None) != (candidates is None):
        missing = "history_timestamps" if history is None else "candidate_timestamps"
        raise ValueError(f"timestamps come in pairs: {missing} is None and the other is not")
    for name, times, length in (
        ("history_timestamps", history, num_items),
        ("candidate_timestamps", candidates, num_candidates),
    ):
        if times is not None and times.shape != (length,):
            raise ValueError(f"{name} must have shape [{length}], got {list(times.shape)}")


def _check_offsets(
    history_offsets: Tensor, candidate_offsets: Tensor, num_items: int, num_candidates: int
) -> int:
    """Both offsets fit their values and each other; returns the longest history."""
    if history_offsets.shape != candidate_offsets.shape or history_offsets.dim() != 1:
        raise ValueError(
            "history_offsets and candidate_offsets must both be [B + 1], got "
            f"{list(history_offsets.shape)} and {list(candidate_offsets.shape)}"
        )
    if history_offsets.numel() == 0:
        raise ValueError("history_offsets must be [B + 1] with B >= 0, got no element")
    both = torch.stack([history_offsets.long(), candidate_offsets.long()]).cpu()
    for name, offsets, total in (
        ("history_offsets", both[0], num_items),
        ("candidate_offsets", both[1], num_candidates),
    ):
        if int(offsets[0]) != 0 or int(offsets[-1]) != total or bool((offsets.diff() < 0).any()):
            raise ValueError(
                f"{name} must ascend from 0 to the number of rows, {total}, got {offsets.tolist()}"
            )
    return max(both[0].diff().tolist(), default=0)
