"""PGSA's selection (Eq. 5) as kernels, in three steps.

score   e_C . e_i; the history is read once, one number per item is written, and the largest of
        every group of consecutive visible items.
select  one program per candidate finds the K groups with the largest maxima, and among their
        items the top K: the other groups cannot hold any of them. Both times it bisects a
        threshold over the bits of numbers in registers, prefers the most recent of equal scores
        and keeps the order.
write   an item belongs to its nearest anchor: between two anchors the midpoint decides. So the
        kept items of a candidate are K short ranges, written without reading the history again,
        and M follows from the distance to the anchor of the range.

The number of kept rows is at most K (2 radius + 1) + recent, so nothing waits for the device.
"""

import functools
import math
from dataclasses import replace
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
from hpgr_plugin.ops.preference_plan.plan import (
    PlanInputs,
    PlanSettings,
    PlanTimes,
    PreferencePlan,
    Selection,
    gaussian_kernel,
    kernel_length,
)

LONGEST_HISTORY = 2**18  # the maxima of one candidate stay in the registers of one program
_LARGEST_TILE = 2**16  # anchors times the items they reach, likewise
_FEW_PROGRAMS = 1024
_SEARCHES = 32  # candidates whose visible history one program counts


def why_not(inputs: PlanInputs, settings: PlanSettings) -> str | None:
    """Why the kernels do not support the case, or None."""
    dtype, max_history = _same_dtype(inputs).history_embeddings.dtype, inputs.max_history or 0
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {dtype}"
    if max_history > LONGEST_HISTORY:
        return f"a history of {max_history} items, more than {LONGEST_HISTORY}"
    reach = len(_weight_table(settings.sigma, settings.eps, max_history, torch.device("cpu")))
    tile = triton.next_power_of_2(max(1, settings.top_k)) * triton.next_power_of_2(2 * reach)
    if tile > _LARGEST_TILE:
        return f"top_k={settings.top_k} anchors that reach {reach} items to each side"
    return None


def plan_preferences(inputs: PlanInputs, settings: PlanSettings) -> PreferencePlan:
    """See `hpgr_plugin.ops.preference_plan.plan_preferences`; the inputs are checked.

    It waits once for the device, for the number of rows it kept.
    """
    inputs = _same_dtype(inputs)
    selection = _select(inputs, settings, with_candidates=False, matrix=False, wide=True)
    kept = int(selection.offsets[-1])
    return PreferencePlan(selection.index[:kept], selection.weights[:kept], selection.offsets)


def select(inputs: PlanInputs, settings: PlanSettings, *, with_candidates: bool) -> Selection:
    """The plan of every candidate, without waiting for the device.

    Args:
        inputs: with both bounds; embeddings of one dtype, float32, bfloat16 or float16.
        settings: see `plan_preferences`.
        with_candidates: append each candidate's row to its kept items.

    Raises:
        ValueError: `inputs` has no bounds.
    """
    return _select(inputs, settings, with_candidates=with_candidates, matrix=False)


def weight_matrix(inputs: PlanInputs, settings: PlanSettings) -> Tensor:
    """M `[C, max_history]` float32 by place in the user's history, 0 where nothing is kept.

    For the layout "shared_history", in which candidates share the reads of a history. Arguments as
    in `select`.
    """
    weights = _select(inputs, settings, with_candidates=False, matrix=True).weights
    return weights.view(len(inputs.candidate_embeddings), inputs.max_history or 0)


def count_earlier(times: PlanTimes) -> Tensor:
    """See `hpgr_plugin.ops.preference_plan.count_earlier`."""
    return _earlier(times, torch.int64)


def _earlier(times: PlanTimes, dtype: torch.dtype) -> Tensor:
    counts = torch.empty(len(times.candidates), dtype=dtype, device=times.history.device)
    blocks = triton.cdiv(times.max_candidates, _SEARCHES)
    programs = (len(times.history_offsets) - 1) * blocks
    if programs:
        visible_kernel[(programs,)](
            times.history.contiguous(), times.candidates.contiguous(), times.history_offsets,
            times.candidate_offsets, counts, blocks, times.max_history.bit_length(),
            LANES=_SEARCHES, num_warps=1,
        )  # fmt: skip
    return counts


def why_not_count_earlier(_: PlanTimes) -> str | None:
    """The kernel takes everything."""
    return None


class _Problem(NamedTuple):
    """What the launches share; rows of embeddings may be slices of wider tensors."""

    history: Tensor
    candidates: Tensor
    history_offsets: Tensor
    candidate_offsets: Tensor
    history_timestamps: Tensor | None
    candidate_timestamps: Tensor | None
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


def _problem(inputs: PlanInputs) -> _Problem:
    if inputs.max_history is None or inputs.max_candidates is None:
        raise ValueError(
            "inputs must have max_history and max_candidates, got "
            f"{inputs.max_history} and {inputs.max_candidates}"
        )
    embeddings = inputs.history_embeddings, inputs.candidate_embeddings
    history, candidates = (x if x.stride(-1) == 1 else x.contiguous() for x in embeddings)
    return _Problem(
        history, candidates, inputs.history_offsets, inputs.candidate_offsets,
        inputs.history_timestamps, inputs.candidate_timestamps,
        max_history=inputs.max_history, max_candidates=inputs.max_candidates,
    )  # fmt: skip


def _same_dtype(inputs: PlanInputs) -> PlanInputs:
    """Embeddings of two dtypes become float32."""
    history, candidates = inputs.history_embeddings, inputs.candidate_embeddings
    if history.dtype == candidates.dtype:
        return inputs
    return replace(
        inputs, history_embeddings=history.float(), candidate_embeddings=candidates.float()
    )


@torch.no_grad()
def _select(
    inputs: PlanInputs,
    settings: PlanSettings,
    *,
    with_candidates: bool,
    matrix: bool,
    wide: bool = False,
) -> Selection:
    """`select`; with `matrix`, the weights are `[C, max_history]` instead and there is no index.

    With `wide`, the index is int64 in any case.
    """
    problem = _problem(inputs)
    max_history, (top_k, sigma, eps, recent) = problem.max_history, settings
    device, num_candidates = problem.history.device, len(problem.candidates)
    table = _weight_table(sigma, eps, max_history, device)
    extra, radius = int(with_candidates), len(table) - 1
    longest = min(max_history, top_k * (2 * radius + 1) + recent) + extra
    room = num_candidates * longest
    narrow = not wide and len(problem.history) + num_candidates < 2**31
    rows = torch.int32 if narrow else torch.int64
    index = problem.empty(0 if matrix else room, dtype=rows)
    if matrix:
        weights = torch.zeros(num_candidates * max_history, dtype=torch.float32, device=device)
    else:
        weights = problem.empty(room, dtype=torch.float32)
    if num_candidates == 0 or problem.programs == 0:
        offsets = torch.zeros(num_candidates + 1, dtype=torch.int64, device=device)
        return Selection(index, weights, offsets, longest)

    visible = _visible(problem)
    constants: dict[str, Any] = {
        "TOP_K": top_k,
        "ANCHORS": triton.next_power_of_2(max(1, top_k)),
        "RADIUS": radius,
        "RECENT": recent,
        "EXTRA": extra,
        "TIMED": problem.history_timestamps is not None,
    }
    anchors, counts = _anchors(problem, visible, constants)
    offsets = counts.cumsum(0)
    write_kernel[(problem.programs,)](
        anchors, visible, offsets, table, problem.history_offsets, problem.candidate_offsets,
        index, weights, len(problem.history), problem.max_candidates, max_history,
        MATRIX=matrix, REACH=triton.next_power_of_2(2 * radius + 1),
        NEWEST=triton.next_power_of_2(max(1, recent)),
        num_warps=1 if problem.programs > _FEW_PROGRAMS else 4, **constants,
    )  # fmt: skip
    return Selection(index, weights, offsets, longest)


def _visible(problem: _Problem) -> Tensor:
    """How many items each candidate may see, `[C]` int32; without times it is never read."""
    if problem.history_timestamps is None or problem.candidate_timestamps is None:
        return problem.empty(1, dtype=torch.int32)
    times = PlanTimes(
        problem.history_timestamps, problem.history_offsets, problem.candidate_timestamps,
        problem.candidate_offsets, problem.max_history, problem.max_candidates,
    )  # fmt: skip
    return _earlier(times, torch.int32)


def _anchors(
    problem: _Problem, visible: Tensor, constants: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Anchors in order `[C, K]` int32, and 0 and the number of rows of each `[C + 1]` int64."""
    num_candidates, top_k = len(problem.candidates), constants["TOP_K"]
    group = _group_size(problem.max_history, top_k)
    # One candidate per user: its scores lie where its history lies, no wider than it.
    flat = problem.max_candidates == 1
    pitch = 0 if flat else max(16, triton.cdiv(problem.max_history, 16) * 16)
    room = len(problem.history) if flat else num_candidates * pitch
    scores = problem.empty(room, dtype=torch.float32)
    groups = triton.cdiv(max(1, problem.max_history), group)
    maxima = problem.empty(num_candidates, groups, dtype=torch.float32)
    if problem.max_history:
        _score(problem, visible, scores, maxima, pitch, GROUP=group, TIMED=constants["TIMED"])

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


def _score(
    problem: _Problem, visible: Tensor, scores: Tensor, maxima: Tensor, pitch: int, **constants: Any
) -> None:
    """Write scores and maxima; many candidates per user share the reads of its history."""
    history, candidates = problem.history, problem.candidates
    size, most = history.shape[1], problem.max_candidates
    wide = min(512 if most == 1 else 64, max(16, triton.next_power_of_2(size)))
    items = min(128, 16384 // wide)
    blocks = triton.cdiv(problem.max_history, items)
    programs, constants = problem.num_users * blocks, {
        **constants, "SIZE": size, "WIDE": wide, "ITEMS": items, "num_warps": 4,
    }  # fmt: skip
    tensors = (
        history, candidates, problem.history_offsets, problem.candidate_offsets, visible, scores,
        maxima, history.stride(0), candidates.stride(0),
    )  # fmt: skip
    if most == 1:
        score_one_kernel[(programs,)](*tensors, maxima.shape[1], blocks, **constants)
        return
    together = min(64, max(16, triton.next_power_of_2(most)))
    shares = triton.cdiv(most, together)
    score_many_kernel[(programs * shares,)](
        *tensors, pitch, maxima.shape[1], blocks, shares,
        CANDIDATES=together, num_stages=4, **constants,
    )  # fmt: skip


def _weight_table(sigma: float, eps: float, longest: int, device: torch.device) -> Tensor:
    """M by distance, `[radius + 1]` float32, on the device; shared, so never written to.

    One table for all histories that are longer than the kernel, which is nearly all: the copy of a
    new one to the device is waited for.
    """
    return _copied_table(sigma, eps, min(longest, kernel_length(sigma, eps)), device)


@functools.lru_cache(maxsize=64)
def _copied_table(sigma: float, eps: float, longest: int, device: torch.device) -> Tensor:
    return gaussian_kernel(sigma, eps, longest).float().to(device)


def _group_size(max_history: int, top_k: int) -> int:
    """Items per group: about sqrt(N / K), which gives the fewest numbers to look at."""
    longest = triton.next_power_of_2(max(1, max_history))
    return min(32, max(4, triton.next_power_of_2(math.isqrt(longest // max(1, top_k)))))


def _select_warps(numbers: int, programs: int) -> int:
    """Many warps where there are few programs; few where programs compete for the device."""
    per_thread = 16 if programs > _FEW_PROGRAMS else 4
    return min(16, max(1, numbers // (32 * per_thread)))
