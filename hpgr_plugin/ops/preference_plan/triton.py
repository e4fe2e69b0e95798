"""PGSA's selection (Eq. 5) in four launches: score, select, count up, write.

score   e_C . e_i, the history read once; one number an item is written, and the largest of every
        group of consecutive visible items.
select  one program a candidate finds the K groups with the largest maxima, and among their items
        the top K: the other groups cannot hold any. Both times it bisects a threshold over the
        bits of numbers in registers, settles ties by recency and keeps the order.
write   an item belongs to its nearest anchor: between two anchors the midpoint decides. So the
        kept items of a candidate are K short ranges, written without looking at the history
        again, and M follows from the distance to the range's own anchor.

The number of kept rows is bounded by K (2 radius + 1) + recent, so nothing waits for the device.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hpgr_plugin.ops.preference_plan.kernels import (
    score_many_kernel,
    score_one_kernel,
    select_kernel,
    visible_kernel,
    write_kernel,
)
from hpgr_plugin.ops.preference_plan.plan import PreferencePlan, gaussian_kernel

LONGEST_HISTORY = 2**18  # maxima of one candidate stay in the registers of one program
_LARGEST_TILE = 2**16  # anchors times their reach, likewise
_FEW_PROGRAMS = 1024
_SEARCHES = 32  # candidates whose visible history one program counts


class Selection(NamedTuple):
    """A plan with room to spare: rows from `offsets[-1]` on are unspecified.

    With candidates, every candidate's row follows its kept items: a sequence to attend over.

    Attributes:
        index: `[R]` int32 (int64 where T + C needs it), rows of the flat history; candidate c is
            T + c.
        weights: `[R]` float32, M_j; 1 for a candidate.
        offsets: `[C + 1]` int64.
        max_length: an upper bound of the rows of one candidate.
    """

    index: Tensor  # type: ignore[assignment]  # a tuple has an index method too
    weights: Tensor
    offsets: Tensor
    max_length: int


def why_not(
    history_embeddings: Tensor, *, top_k: int, sigma: float, eps: float, max_history: int
) -> str | None:
    """Why `select` does not know the case, or None."""
    if history_embeddings.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {history_embeddings.dtype}"
    if max_history > LONGEST_HISTORY:
        return f"a history of {max_history} items, more than {LONGEST_HISTORY}"
    reach = len(_weight_table(sigma, eps, max_history, torch.device("cpu")))
    tile = triton.next_power_of_2(max(1, top_k)) * triton.next_power_of_2(2 * reach)
    if tile > _LARGEST_TILE:
        return f"top_k={top_k} anchors that reach {reach} items each way"
    return None


@torch.no_grad()
def plan_preferences(
    history_embeddings: Tensor,
    candidate_embeddings: Tensor,
    history_offsets: Tensor,
    candidate_offsets: Tensor,
    *,
    top_k: int = 50,
    sigma: float = 2.0,
    eps: float = 1e-3,
    recent: int = 0,
    history_timestamps: Tensor | None = None,
    candidate_timestamps: Tensor | None = None,
    max_history: int,
    max_candidates: int,
) -> PreferencePlan:
    """`pgsa.plan.plan_preferences`; waits once for the number of rows it kept."""
    selection = select(
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
        max_candidates=max_candidates,
        with_candidates=False,
    )
    kept = int(selection.offsets[-1])
    index = selection.index[:kept].long()
    return PreferencePlan(index, selection.weights[:kept], selection.offsets)


@torch.no_grad()
def select(
    history_embeddings: Tensor,
    candidate_embeddings: Tensor,
    history_offsets: Tensor,
    candidate_offsets: Tensor,
    *,
    top_k: int,
    sigma: float,
    eps: float,
    recent: int,
    history_timestamps: Tensor | None = None,
    candidate_timestamps: Tensor | None = None,
    max_history: int,
    max_candidates: int,
    with_candidates: bool,
) -> Selection:
    """The plan of every candidate, without waiting for the device.

    Args:
        history_embeddings: `[T, D]` float32, bfloat16 or float16.
        candidate_embeddings: `[C, D]` of the same dtype.
        history_offsets, candidate_offsets: `[B + 1]`.
        top_k, sigma, eps, recent: as in `pgsa.plan.plan_preferences`.
        history_timestamps: `[T]`, ascending in each history, so that what a candidate may see
            is the beginning of its user's history.
        candidate_timestamps: `[C]`.
        max_history, max_candidates: upper bounds of items and candidates a user.
        with_candidates: append each candidate's row to its kept items.
    """
    return _select(
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
        max_candidates=max_candidates,
        with_candidates=with_candidates,
        matrix=False,
    )


@torch.no_grad()
def weight_matrix(
    history_embeddings: Tensor,
    candidate_embeddings: Tensor,
    history_offsets: Tensor,
    candidate_offsets: Tensor,
    *,
    top_k: int,
    sigma: float,
    eps: float,
    recent: int,
    history_timestamps: Tensor | None = None,
    candidate_timestamps: Tensor | None = None,
    max_history: int,
    max_candidates: int,
) -> Tensor:
    """M `[C, max_history]` float32 by place in the user's history, 0 where nothing is kept.

    For the candidate layout with candidates enough to share the reads of a history.
    """
    return _select(
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
        max_candidates=max_candidates,
        with_candidates=False,
        matrix=True,
    ).weights.view(len(candidate_embeddings), max_history)


class _Problem(NamedTuple):
    """Histories, candidates and bounds, as in `select`; rows of embeddings may be slices."""

    history: Tensor
    candidates: Tensor
    history_offsets: Tensor
    candidate_offsets: Tensor
    max_history: int
    max_candidates: int

    @property
    def num_users(self) -> int:
        return len(self.history_offsets) - 1

    @property
    def programs(self) -> int:
        """One for every candidate that a user may have."""
        return self.num_users * self.max_candidates

    def empty(self, *sizes: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=self.history.device)


def _select(
    history: Tensor,
    candidates: Tensor,
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
    max_candidates: int,
    with_candidates: bool,
    matrix: bool,
) -> Selection:
    """`select`; with `matrix`, the weights are `[C, max_history]` instead and there is no index."""
    history, candidates = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (history, candidates)
    )
    problem = _Problem(
        history, candidates, history_offsets, candidate_offsets, max_history, max_candidates
    )
    device, num_candidates = history.device, len(candidates)
    table = _weight_table(sigma, eps, max_history, device)
    extra, radius = int(with_candidates), len(table) - 1
    longest = min(max_history, top_k * (2 * radius + 1) + recent) + extra
    room = num_candidates * longest
    rows = torch.int32 if len(history) + num_candidates < 2**31 else torch.int64
    index = problem.empty(0 if matrix else room, dtype=rows)
    if matrix:
        weights = torch.zeros(num_candidates * max_history, dtype=torch.float32, device=device)
    else:
        weights = problem.empty(room, dtype=torch.float32)
    if num_candidates == 0 or problem.programs == 0:
        offsets = torch.zeros(num_candidates + 1, dtype=torch.int64, device=device)
        return Selection(index, weights, offsets, longest)

    visible = _visible(problem, history_timestamps, candidate_timestamps)
    constants: dict[str, Any] = {
        "TOP_K": top_k,
        "ANCHORS": triton.next_power_of_2(max(1, top_k)),
        "RADIUS": radius,
        "RECENT": recent,
        "EXTRA": extra,
        "TIMED": history_timestamps is not None,
    }
    anchors, counts = _anchors(problem, visible, constants)
    offsets = counts.cumsum(0)
    write_kernel[(problem.programs,)](
        anchors, visible, offsets, table, history_offsets, candidate_offsets, index, weights,
        len(history), max_candidates, max_history,
        MATRIX=matrix, REACH=triton.next_power_of_2(2 * radius + 1),
        NEWEST=triton.next_power_of_2(max(1, recent)),
        num_warps=1 if problem.programs > _FEW_PROGRAMS else 4, **constants,
    )  # fmt: skip
    return Selection(index, weights, offsets, longest)


def _visible(
    problem: _Problem, history_timestamps: Tensor | None, candidate_timestamps: Tensor | None
) -> Tensor:
    """How many items each candidate may see, `[C]` int32; without times it is never read."""
    if history_timestamps is None:
        return problem.empty(1, dtype=torch.int32)
    visible = problem.empty(len(problem.candidates), dtype=torch.int32)
    blocks = triton.cdiv(problem.max_candidates, _SEARCHES)
    visible_kernel[(problem.num_users * blocks,)](
        history_timestamps, candidate_timestamps, problem.history_offsets,
        problem.candidate_offsets, visible, blocks, problem.max_history.bit_length(),
        LANES=_SEARCHES, num_warps=1,
    )  # fmt: skip
    return visible


def _anchors(
    problem: _Problem, visible: Tensor, constants: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Anchors in order `[C, K]` int32, and 0 and the number of rows of each `[C + 1]` int64."""
    num_candidates, top_k = len(problem.candidates), constants["TOP_K"]
    group = _group_size(problem.max_history, top_k)
    # One candidate a user: its scores lie where its history lies, no wider than it.
    flat = problem.max_candidates == 1
    pitch = 0 if flat else max(16, triton.cdiv(problem.max_history, 16) * 16)
    room = len(problem.history) if flat else num_candidates * pitch
    scores = problem.empty(room, dtype=torch.float32)
    groups = triton.cdiv(max(1, problem.max_history), group)
    maxima = problem.empty(num_candidates, groups, dtype=torch.float32)
    if problem.max_history:
        score = _score_one if flat else _score_many
        score(problem, visible, scores, maxima, pitch, GROUP=group, TIMED=constants["TIMED"])

    anchors = problem.empty(num_candidates, max(1, top_k), dtype=torch.int32)
    counts = problem.empty(num_candidates + 1, dtype=torch.int64)
    num_groups = triton.next_power_of_2(groups)
    likely = min(num_groups, constants["ANCHORS"]) * group
    select_kernel[(problem.programs,)](
        scores, maxima, visible, problem.history_offsets, problem.candidate_offsets, anchors,
        counts, pitch, groups, problem.max_candidates,
        FLAT=flat, GROUP=group, GROUPS=num_groups, LIKELY=likely,
        num_warps=_select_warps(max(num_groups, likely), problem.programs), **constants,
    )  # fmt: skip
    return anchors, counts


def _score_one(
    problem: _Problem,
    visible: Tensor,
    scores: Tensor,
    maxima: Tensor,
    _pitch: int,
    **constants: Any,
) -> None:
    """Scores and maxima of one candidate a user."""
    history, candidates = problem.history, problem.candidates
    size = history.shape[1]
    wide = min(512, max(16, triton.next_power_of_2(size)))
    items = min(128, 16384 // wide)
    blocks = triton.cdiv(problem.max_history, items)
    score_one_kernel[(problem.num_users * blocks,)](
        history, candidates, problem.history_offsets, problem.candidate_offsets, visible, scores,
        maxima, history.stride(0), candidates.stride(0), maxima.shape[1], blocks,
        SIZE=size, WIDE=wide, ITEMS=items, num_warps=4, **constants,
    )  # fmt: skip


def _score_many(
    problem: _Problem, visible: Tensor, scores: Tensor, maxima: Tensor, pitch: int, **constants: Any
) -> None:
    """Scores and maxima of many candidates a user, which share the reads of its history."""
    history, candidates = problem.history, problem.candidates
    size, items = history.shape[1], 128
    wide = min(64, max(16, triton.next_power_of_2(size)))
    together = min(64, max(16, triton.next_power_of_2(problem.max_candidates)))
    blocks = triton.cdiv(problem.max_history, items)
    shares = triton.cdiv(problem.max_candidates, together)
    score_many_kernel[(problem.num_users * blocks * shares,)](
        history, candidates, problem.history_offsets, problem.candidate_offsets, visible, scores,
        maxima, history.stride(0), candidates.stride(0), pitch, maxima.shape[1], blocks, shares,
        SIZE=size, WIDE=wide, ITEMS=items, CANDIDATES=together, num_warps=4, num_stages=4,
        **constants,
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _weight_table(sigma: float, eps: float, longest: int, device: torch.device) -> Tensor:
    """M by distance, `[radius + 1]` float32, on the device; never changed by anyone."""
    return gaussian_kernel(sigma, eps, longest).float().to(device)


def _group_size(max_history: int, top_k: int) -> int:
    """Items to a group: about sqrt(N / K), where the groups and the likely items are fewest."""
    longest = triton.next_power_of_2(max(1, max_history))
    return min(32, max(4, triton.next_power_of_2(math.isqrt(longest // max(1, top_k)))))


def _select_warps(numbers: int, programs: int) -> int:
    """Few programs are to finish soon, many are to leave room for each other."""
    per_thread = 16 if programs > _FEW_PROGRAMS else 4
    return min(16, max(1, numbers // (32 * per_thread)))
