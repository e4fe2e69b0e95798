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

# mypy: disable-error-code="no-untyped-def,annotation-unchecked"

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpgr_plugin.pgsa.plan import PreferencePlan, gaussian_kernel

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

    For the candidate scope with candidates enough to share the reads of a history.
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
    # Rows of the embeddings may lie in a wider tensor, their elements side by side.
    history, candidates = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (history, candidates)
    )
    device, num_candidates = history.device, len(candidates)
    num_users, extra = len(history_offsets) - 1, int(with_candidates)
    table = _weight_table(sigma, eps, max_history, device)
    radius = len(table) - 1
    longest = min(max_history, top_k * (2 * radius + 1) + recent) + extra
    rows = torch.int32 if len(history) + num_candidates < 2**31 else torch.int64
    if matrix:
        index = torch.empty(0, dtype=rows, device=device)
        weights = torch.zeros(num_candidates * max_history, dtype=torch.float32, device=device)
    else:
        index = torch.empty(num_candidates * longest, dtype=rows, device=device)
        weights = torch.empty(num_candidates * longest, dtype=torch.float32, device=device)
    if num_candidates == 0 or max_candidates == 0 or num_users == 0:
        offsets = torch.zeros(num_candidates + 1, dtype=torch.int64, device=device)
        return Selection(index, weights, offsets, longest)

    timed = history_timestamps is not None
    visible = torch.empty(num_candidates if timed else 1, dtype=torch.int32, device=device)
    if timed:
        _visible_kernel[(num_users * triton.cdiv(max_candidates, _SEARCHES),)](
            history_timestamps, candidate_timestamps, history_offsets, candidate_offsets, visible,
            triton.cdiv(max_candidates, _SEARCHES), max_history.bit_length(), LANES=_SEARCHES,
            num_warps=1,
        )  # fmt: skip
    # One candidate a user: its scores lie where its history lies, no wider than it.
    flat = max_candidates == 1
    pitch = 0 if flat else max(16, triton.cdiv(max_history, 16) * 16)
    room = len(history) if flat else num_candidates * pitch
    scores = torch.empty(room, dtype=torch.float32, device=device)
    group = _group_size(max_history, top_k)
    maxima = torch.empty(
        num_candidates, triton.cdiv(max(1, max_history), group), dtype=torch.float32, device=device
    )
    _score(history, candidates, history_offsets, candidate_offsets, visible, scores, maxima,
           pitch, group, max_history, max_candidates, timed=timed)  # fmt: skip

    anchors = torch.empty(num_candidates, max(1, top_k), dtype=torch.int32, device=device)
    counts = torch.empty(num_candidates + 1, dtype=torch.int64, device=device)
    constants: dict[str, Any] = {
        "TOP_K": top_k,
        "ANCHORS": triton.next_power_of_2(max(1, top_k)),
        "RADIUS": radius,
        "RECENT": recent,
        "EXTRA": extra,
        "TIMED": timed,
    }
    num_groups = triton.next_power_of_2(maxima.shape[1])
    likely = min(num_groups, constants["ANCHORS"]) * group
    _select_kernel[(num_users * max_candidates,)](
        scores,
        maxima,
        visible,
        history_offsets,
        candidate_offsets,
        anchors,
        counts,
        pitch,
        maxima.shape[1],
        max_candidates,
        FLAT=flat,
        GROUP=group,
        GROUPS=num_groups,
        LIKELY=likely,
        num_warps=_select_warps(max(num_groups, likely), num_users * max_candidates),
        **constants,
    )
    offsets = counts.cumsum(0)
    _write_kernel[(num_users * max_candidates,)](
        anchors,
        visible,
        offsets,
        table,
        history_offsets,
        candidate_offsets,
        index,
        weights,
        len(history),
        max_candidates,
        max_history,
        MATRIX=matrix,
        REACH=triton.next_power_of_2(2 * radius + 1),
        NEWEST=triton.next_power_of_2(max(1, recent)),
        num_warps=1 if num_users * max_candidates > _FEW_PROGRAMS else 4,
        **constants,
    )
    return Selection(index, weights, offsets, longest)


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


def _score(
    history: Tensor,
    candidates: Tensor,
    history_offsets: Tensor,
    candidate_offsets: Tensor,
    visible: Tensor,
    scores: Tensor,
    maxima: Tensor,
    pitch: int,
    group: int,
    max_history: int,
    max_candidates: int,
    *,
    timed: bool,
) -> None:
    num_users, size = len(history_offsets) - 1, history.shape[1]
    if max_history == 0:
        return
    if max_candidates == 1:
        wide = min(512, max(16, triton.next_power_of_2(size)))
        items = min(128, 16384 // wide)
        blocks = triton.cdiv(max_history, items)
        _score_one_kernel[(num_users * blocks,)](
            history,
            candidates,
            history_offsets,
            candidate_offsets,
            visible,
            scores,
            maxima,
            history.stride(0),
            candidates.stride(0),
            maxima.shape[1],
            blocks,
            SIZE=size,
            WIDE=wide,
            ITEMS=items,
            GROUP=group,
            TIMED=timed,
            num_warps=4,
        )
        return
    wide = min(64, max(16, triton.next_power_of_2(size)))
    wanted = min(64, max(16, triton.next_power_of_2(max_candidates)))
    blocks, shares = triton.cdiv(max_history, 128), triton.cdiv(max_candidates, wanted)
    _score_many_kernel[(num_users * blocks * shares,)](
        history,
        candidates,
        history_offsets,
        candidate_offsets,
        visible,
        scores,
        maxima,
        history.stride(0),
        candidates.stride(0),
        pitch,
        maxima.shape[1],
        blocks,
        shares,
        SIZE=size,
        WIDE=wide,
        ITEMS=128,
        CANDIDATES=wanted,
        GROUP=group,
        TIMED=timed,
        num_warps=4,
        num_stages=4,
    )


@triton.jit
def _visible_kernel(HistoryTimes, CandidateTimes, HistoryOffsets, CandidateOffsets, Visible,
                    blocks, steps, LANES: tl.constexpr):  # fmt: skip
    """How many items come before each candidate: a binary search in every lane."""
    user = tl.program_id(0) // blocks
    candidate = tl.load(CandidateOffsets + user).to(tl.int64)
    candidate += tl.program_id(0) % blocks * LANES + tl.arange(0, LANES)
    there = candidate < tl.load(CandidateOffsets + user + 1).to(tl.int64)
    start = tl.load(HistoryOffsets + user).to(tl.int64)
    length = (tl.load(HistoryOffsets + user + 1).to(tl.int64) - start).to(tl.int32)
    now = tl.load(CandidateTimes + candidate, mask=there, other=0)
    low = tl.zeros((LANES,), dtype=tl.int32)
    high = low + length
    for _ in range(steps):
        middle = (low + high) // 2
        open_ = low < high
        time = tl.load(HistoryTimes + start + middle, mask=open_, other=0)
        low = tl.where(open_ & (time < now), middle + 1, low)
        high = tl.where(open_ & (time >= now), middle, high)
    tl.store(Visible + candidate, low, mask=there)


@triton.jit
def _score_one_kernel(History, Candidates, HistoryOffsets, CandidateOffsets, Visible, Scores,
                      Maxima, stride_h, stride_c, pitch_m, blocks, SIZE: tl.constexpr,
                      WIDE: tl.constexpr, ITEMS: tl.constexpr, GROUP: tl.constexpr,
                      TIMED: tl.constexpr):  # fmt: skip
    user = tl.program_id(0) // blocks
    candidate = tl.load(CandidateOffsets + user).to(tl.int64)
    start = tl.load(HistoryOffsets + user).to(tl.int64)
    length = (tl.load(HistoryOffsets + user + 1).to(tl.int64) - start).to(tl.int32)
    first = (tl.program_id(0) % blocks) * ITEMS
    if first >= length or candidate >= tl.load(CandidateOffsets + user + 1).to(tl.int64):
        return
    visible = length
    if TIMED:
        visible = tl.load(Visible + candidate)
    items = first + tl.arange(0, ITEMS)
    inside = items < visible
    rows = History + (start + items)[:, None] * stride_h
    # Products are summed at the end: every item is rounded the same way, so ties stay ties.
    total = tl.zeros((ITEMS, WIDE), dtype=tl.float32)
    for low in tl.static_range(0, SIZE, WIDE):
        places = low + tl.arange(0, WIDE)
        held = places < SIZE
        item = tl.load(rows + places[None, :], mask=inside[:, None] & held[None, :], other=0.0)
        wanted = tl.load(Candidates + candidate * stride_c + places, mask=held, other=0.0)
        total += item.to(tl.float32) * wanted.to(tl.float32)[None, :]
    score = tl.sum(total, axis=1)
    tl.store(Scores + start + items, score, mask=inside)
    score = tl.where(inside, score, float("-inf"))
    best = tl.max(tl.reshape(score, (ITEMS // GROUP, GROUP)), axis=1)
    groups = first // GROUP + tl.arange(0, ITEMS // GROUP)
    tl.store(Maxima + candidate * pitch_m + groups, best, mask=groups < pitch_m)


@triton.jit
def _score_many_kernel(History, Candidates, HistoryOffsets, CandidateOffsets, Visible, Scores,
                       Maxima, stride_h, stride_c, pitch, pitch_m, blocks, shares,
                       SIZE: tl.constexpr, WIDE: tl.constexpr, ITEMS: tl.constexpr,
                       CANDIDATES: tl.constexpr, GROUP: tl.constexpr,
                       TIMED: tl.constexpr):  # fmt: skip
    # The shares of the candidates over one block of items are neighbours: they share its reads.
    share = tl.program_id(0) % shares
    block = tl.program_id(0) // shares % blocks
    user = tl.program_id(0) // shares // blocks
    start = tl.load(HistoryOffsets + user).to(tl.int64)
    length = (tl.load(HistoryOffsets + user + 1).to(tl.int64) - start).to(tl.int32)
    first_candidate = tl.load(CandidateOffsets + user).to(tl.int64) + share * CANDIDATES
    last_candidate = tl.load(CandidateOffsets + user + 1).to(tl.int64)
    first = block * ITEMS
    if first >= length or first_candidate >= last_candidate:
        return
    items = first + tl.arange(0, ITEMS)
    candidates = first_candidate + tl.arange(0, CANDIDATES)
    inside = items < length
    wanted = candidates < last_candidate
    total = tl.zeros((CANDIDATES, ITEMS), dtype=tl.float32)
    for low in range(0, SIZE, WIDE):
        places = low + tl.arange(0, WIDE)
        held = places < SIZE
        item = tl.load(History + (start + items)[:, None] * stride_h + places[None, :],
                       mask=inside[:, None] & held[None, :], other=0.0)  # fmt: skip
        candidate = tl.load(Candidates + candidates[:, None] * stride_c + places[None, :],
                            mask=wanted[:, None] & held[None, :], other=0.0)  # fmt: skip
        total = tl.dot(candidate, tl.trans(item), total, input_precision="ieee")
    where = Scores + candidates[:, None] * pitch + items[None, :]
    tl.store(where, total, mask=wanted[:, None] & inside[None, :])
    seen = inside[None, :] & wanted[:, None]
    if TIMED:
        visible = tl.load(Visible + candidates, mask=wanted, other=0)
        seen = items[None, :] < visible[:, None]
    total = tl.where(seen, total, float("-inf"))
    best = tl.max(tl.reshape(total, (CANDIDATES, ITEMS // GROUP, GROUP)), axis=2)
    groups = first // GROUP + tl.arange(0, ITEMS // GROUP)
    where = Maxima + candidates[:, None] * pitch_m + groups[None, :]
    tl.store(where, best, mask=wanted[:, None] & (groups < pitch_m)[None, :])


@triton.jit
def _threshold(key, seen, wanted, floor):
    """The largest threshold that at least `wanted` of the seen keys reach, at least one of them.

    `floor` is one that so many reach. Done early when exactly `wanted` do. Three tries at a time:
    a count waits for all warps, comparing costs next to nothing.
    """
    low = tl.maximum(tl.min(tl.where(seen, key, 0x7FFFFFFF)), floor).to(tl.int64)
    high = tl.max(tl.where(seen, key, -0x80000000)).to(tl.int64)
    while low < high:
        step = (high - low + 3) // 4
        first = low + step
        second = tl.minimum(first + step, high)
        third = tl.minimum(second + step, high)
        # No count is more than there are keys, and those are few: the three of them are one sum.
        if key.numel < 1024:
            wide = tl.zeros(key.shape, dtype=tl.int32)
            bits: tl.constexpr = 10
        else:
            wide = tl.zeros(key.shape, dtype=tl.int64)
            bits: tl.constexpr = 20
        wide += key >= first.to(tl.int32)
        wide += (key >= second.to(tl.int32)).to(wide.dtype) << bits
        wide += (key >= third.to(tl.int32)).to(wide.dtype) << (2 * bits)
        reached = tl.sum(wide)
        reach_first = reached & ((1 << bits) - 1)
        reach_second = (reached >> bits) & ((1 << bits) - 1)
        reach_third = reached >> (2 * bits)
        if reach_third >= wanted:
            low = third
            high = tl.where(reach_third == wanted, third, high)
        elif reach_second >= wanted:
            low = second
            high = tl.where(reach_second == wanted, second, third - 1)
        elif reach_first >= wanted:
            low = first
            high = tl.where(reach_first == wanted, first, second - 1)
        else:
            high = first - 1
    return low.to(tl.int32)


@triton.jit
def _top(key, seen, wanted, threshold):
    """The `wanted` largest of the seen keys, by their threshold; equal ones from the end on."""
    above = seen & (key > threshold)
    tied = seen & (key == threshold)
    spare = wanted - tl.sum(above.to(tl.int32))
    num_tied = tl.sum(tied.to(tl.int32))
    chosen = above | tied
    if num_tied != spare:
        older = tl.cumsum(tied.to(tl.int32), 0)
        chosen = above | (tied & (num_tied - older < spare))
    return chosen


@triton.jit
def _sortable(score, seen):
    """The order of floats as the order of integers; -0 is 0, what is not seen comes last."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(seen, bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x80000000)


@triton.jit
def _ranges(anchor, before, after, limit, first, last, RADIUS: tl.constexpr):
    """The items nearest to each anchor and within its reach: start and count.

    `before` and `after` are the neighbouring anchors, `first` and `last` mark those without.
    """
    low = tl.maximum(anchor - RADIUS, 0)
    low = tl.where(first, low, tl.maximum(low, (before + anchor) // 2 + 1))
    high = tl.minimum(anchor + RADIUS + 1, limit)
    high = tl.where(last, high, tl.minimum(high, (anchor + after) // 2 + 1))
    return low, tl.maximum(high - low, 0)


@triton.jit
def _anchor_ranges(Anchors, candidate, found, limit, TOP_K: tl.constexpr,
                   ANCHORS: tl.constexpr, RADIUS: tl.constexpr):  # fmt: skip
    k = tl.arange(0, ANCHORS)
    held = k < found
    row = Anchors + candidate * max(TOP_K, 1)
    anchor = tl.load(row + k, mask=held, other=0)
    before = tl.load(row + k - 1, mask=held & (k > 0), other=0)
    after = tl.load(row + k + 1, mask=k + 1 < found, other=0)
    low, count = _ranges(anchor, before, after, limit, k == 0, k + 1 >= found, RADIUS)
    return anchor, low, tl.where(held, count, 0)


@triton.jit
def _select_kernel(Scores, Maxima, Visible, HistoryOffsets, CandidateOffsets, Anchors, Counts,
                   pitch, pitch_m, max_candidates,
                   TOP_K: tl.constexpr, ANCHORS: tl.constexpr, RADIUS: tl.constexpr,
                   RECENT: tl.constexpr, EXTRA: tl.constexpr, TIMED: tl.constexpr,
                   FLAT: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
                   LIKELY: tl.constexpr):  # fmt: skip
    user = tl.program_id(0) // max_candidates
    candidate = tl.load(CandidateOffsets + user).to(tl.int64) + tl.program_id(0) % max_candidates
    if tl.program_id(0) == 0:
        tl.store(Counts, 0)
    if candidate >= tl.load(CandidateOffsets + user + 1).to(tl.int64):
        return
    start = tl.load(HistoryOffsets + user).to(tl.int64)
    visible = (tl.load(HistoryOffsets + user + 1).to(tl.int64) - start).to(tl.int32)
    if TIMED:
        visible = tl.load(Visible + candidate)
    found = tl.minimum(visible, TOP_K)
    if TOP_K > 0:
        anchors = Anchors + candidate * TOP_K
        slot = tl.arange(0, LIKELY)
        item = slot
        seen = item < visible
        floor = -0x80000000
        if GROUPS > ANCHORS:
            # A group outside the K with the largest maxima, equal ones by recency, holds no item
            # of the top K: each of those K holds one that comes before all of its items.
            groups = (visible + GROUP - 1) // GROUP
            number = tl.arange(0, GROUPS)
            there = number < groups
            best = tl.load(Maxima + candidate * pitch_m + number, mask=there, other=0.0)
            key = _sortable(best, there)
            wanted = tl.minimum(groups, TOP_K)
            threshold = _threshold(key, there, wanted, floor)
            chosen = _top(key, there, wanted, threshold)
            floor = tl.where(groups < found, floor, threshold)  # as many items reach it
            tl.store(anchors + tl.cumsum(chosen.to(tl.int32), 0) - 1, number, mask=chosen)
            tl.debug_barrier()
            held = slot // GROUP < wanted
            item = tl.load(anchors + slot // GROUP, mask=held, other=0) * GROUP + slot % GROUP
            seen = held & (item < visible)
            tl.debug_barrier()
        row = Scores + (start if FLAT else candidate * pitch)
        key = _sortable(tl.load(row + item, mask=seen, other=0.0), seen)
        chosen = _top(key, seen, found, _threshold(key, seen, found, floor))
        tl.store(anchors + tl.cumsum(chosen.to(tl.int32), 0) - 1, item, mask=chosen)
        tl.debug_barrier()

    newest = tl.minimum(visible, RECENT)
    _, _, count = _anchor_ranges(
        Anchors, candidate, found, visible - newest, TOP_K, ANCHORS, RADIUS
    )
    tl.store(Counts + 1 + candidate, (tl.sum(count) + newest + EXTRA).to(tl.int64))


@triton.jit
def _write_kernel(Anchors, Visible, Offsets, Table, HistoryOffsets, CandidateOffsets,
                  Index, Weights, num_items, max_candidates, max_history,
                  TOP_K: tl.constexpr, ANCHORS: tl.constexpr, RADIUS: tl.constexpr,
                  RECENT: tl.constexpr, EXTRA: tl.constexpr, TIMED: tl.constexpr,
                  REACH: tl.constexpr, NEWEST: tl.constexpr,
                  MATRIX: tl.constexpr):  # fmt: skip
    user = tl.program_id(0) // max_candidates
    candidate = tl.load(CandidateOffsets + user).to(tl.int64) + tl.program_id(0) % max_candidates
    if candidate >= tl.load(CandidateOffsets + user + 1).to(tl.int64):
        return
    start = tl.load(HistoryOffsets + user).to(tl.int64)
    visible = (tl.load(HistoryOffsets + user + 1).to(tl.int64) - start).to(tl.int32)
    if TIMED:
        visible = tl.load(Visible + candidate)
    newest = tl.minimum(visible, RECENT)
    limit = visible - newest
    anchor, low, count = _anchor_ranges(
        Anchors, candidate, tl.minimum(visible, TOP_K), limit, TOP_K, ANCHORS, RADIUS
    )
    first = candidate * max_history if MATRIX else tl.load(Offsets + candidate)
    step = tl.arange(0, REACH)[None, :]
    item = low[:, None] + step
    held = step < count[:, None]
    place = first + (item if MATRIX else (tl.cumsum(count, 0) - count)[:, None] + step)
    distance = tl.abs(item - anchor[:, None])
    weight = tl.load(Table + distance, mask=held, other=0.0)
    if not MATRIX:
        tl.store(Index + place, start + item, mask=held)
    tl.store(Weights + place, weight, mask=held)

    recent = tl.arange(0, NEWEST)
    held = recent < newest
    place = first + (limit if MATRIX else tl.sum(count)) + recent
    if not MATRIX:
        tl.store(Index + place, start + limit + recent, mask=held)
    tl.store(Weights + place, 1.0, mask=held)
    if EXTRA:
        last = first + tl.sum(count) + newest
        tl.store(Index + last, num_items + candidate)
        tl.store(Weights + last, 1.0)
