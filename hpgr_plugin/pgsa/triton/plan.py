"""PGSA's selection (Eq. 5) in four launches: score, select, count up, write.

score   e_C . e_i, the history read once; one number an item is written.
select  one program a candidate holds all its scores in registers, bisects the threshold of the
        top K over their bits, settles ties by recency and keeps the K anchors in order.
write   an item belongs to its nearest anchor: between two anchors the midpoint decides. So the
        kept items of a candidate are K short ranges, written without looking at the history
        again, and M follows from the distance to the range's own anchor.

The number of kept rows is bounded by K (2 radius + 1) + recent, so nothing waits for the device.
"""

# mypy: disable-error-code="no-untyped-def"

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpgr_plugin.pgsa.plan import PreferencePlan, gaussian_kernel

LONGEST_HISTORY = 2**15  # scores of one candidate stay in the registers of one program
_LARGEST_TILE = 2**16  # anchors times their reach, likewise
_FEW_PROGRAMS = 1024


class Selection(NamedTuple):
    """A plan with room to spare: rows from `offsets[-1]` on are unspecified.

    With candidates, every candidate's row follows its kept items: a sequence to attend over.

    Attributes:
        index: `[R]` int64, rows of the flat history; candidate c is T + c.
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
    return PreferencePlan(selection.index[:kept], selection.weights[:kept], selection.offsets)


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
    if matrix:
        index = torch.empty(0, dtype=torch.int64, device=device)
        weights = torch.zeros(num_candidates * max_history, dtype=torch.float32, device=device)
    else:
        index = torch.empty(num_candidates * longest, dtype=torch.int64, device=device)
        weights = torch.empty(num_candidates * longest, dtype=torch.float32, device=device)
    if num_candidates == 0 or max_candidates == 0 or num_users == 0:
        offsets = torch.zeros(num_candidates + 1, dtype=torch.int64, device=device)
        return Selection(index, weights, offsets, longest)

    # One candidate a user: its scores lie where its history lies, no wider than it.
    flat = max_candidates == 1
    pitch = 0 if flat else max(16, triton.cdiv(max_history, 16) * 16)
    room = len(history) if flat else num_candidates * pitch
    scores = torch.empty(room, dtype=torch.float32, device=device)
    _score(history, candidates, history_offsets, candidate_offsets, scores, pitch,
           max_history, max_candidates)  # fmt: skip

    anchors = torch.empty(num_candidates, max(1, top_k), dtype=torch.int32, device=device)
    visible = torch.empty(num_candidates, dtype=torch.int32, device=device)
    found = torch.empty(num_candidates, dtype=torch.int32, device=device)
    counts = torch.empty(num_candidates + 1, dtype=torch.int64, device=device)
    block = triton.next_power_of_2(max(16, max_history))
    timed = history_timestamps is not None
    constants: dict[str, Any] = {
        "TOP_K": top_k,
        "ANCHORS": triton.next_power_of_2(max(1, top_k)),
        "RADIUS": radius,
        "RECENT": recent,
        "EXTRA": extra,
    }
    _select_kernel[(num_users * max_candidates,)](
        scores,
        history_offsets,
        candidate_offsets,
        history_timestamps if timed else scores,
        candidate_timestamps if timed else scores,
        anchors,
        visible,
        found,
        counts,
        pitch,
        max_candidates,
        TIMED=timed,
        FLAT=flat,
        BLOCK=block,
        num_warps=_select_warps(block, num_users * max_candidates),
        **constants,
    )
    offsets = counts.cumsum(0)
    _write_kernel[(num_users * max_candidates,)](
        anchors,
        visible,
        found,
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
        num_warps=4,
        **constants,
    )
    return Selection(index, weights, offsets, longest)


@functools.lru_cache(maxsize=64)
def _weight_table(sigma: float, eps: float, longest: int, device: torch.device) -> Tensor:
    """M by distance, `[radius + 1]` float32, on the device; never changed by anyone."""
    return gaussian_kernel(sigma, eps, longest).float().to(device)


def _select_warps(block: int, programs: int) -> int:
    """Few programs are to finish soon, many are to leave room for each other."""
    per_thread = 32 if programs > _FEW_PROGRAMS else 16
    return min(32, max(1, block // (32 * per_thread)))


def _score(
    history: Tensor,
    candidates: Tensor,
    history_offsets: Tensor,
    candidate_offsets: Tensor,
    scores: Tensor,
    pitch: int,
    max_history: int,
    max_candidates: int,
) -> None:
    num_users, size = len(history_offsets) - 1, history.shape[1]
    if max_history == 0:
        return
    if max_candidates == 1:
        wide = min(512, max(16, triton.next_power_of_2(size)))
        items = max(1, min(128, 16384 // wide))
        blocks = triton.cdiv(max_history, items)
        _score_one_kernel[(num_users * blocks,)](
            history,
            candidates,
            history_offsets,
            candidate_offsets,
            scores,
            history.stride(0),
            candidates.stride(0),
            blocks,
            SIZE=size,
            WIDE=wide,
            ITEMS=items,
            num_warps=4,
        )
        return
    wide = min(64, max(16, triton.next_power_of_2(size)))
    group = min(64, max(16, triton.next_power_of_2(max_candidates)))
    blocks, groups = triton.cdiv(max_history, 128), triton.cdiv(max_candidates, group)
    _score_many_kernel[(num_users * blocks * groups,)](
        history,
        candidates,
        history_offsets,
        candidate_offsets,
        scores,
        history.stride(0),
        candidates.stride(0),
        pitch,
        blocks,
        groups,
        SIZE=size,
        WIDE=wide,
        ITEMS=128,
        GROUP=group,
        num_warps=4,
        num_stages=3,
    )


@triton.jit
def _score_one_kernel(History, Candidates, HistoryOffsets, CandidateOffsets, Scores,
                      stride_h, stride_c, blocks, SIZE: tl.constexpr, WIDE: tl.constexpr,
                      ITEMS: tl.constexpr):  # fmt: skip
    user = tl.program_id(0) // blocks
    candidate = tl.load(CandidateOffsets + user).to(tl.int64)
    start = tl.load(HistoryOffsets + user).to(tl.int64)
    length = (tl.load(HistoryOffsets + user + 1).to(tl.int64) - start).to(tl.int32)
    first = (tl.program_id(0) % blocks) * ITEMS
    if first >= length or candidate >= tl.load(CandidateOffsets + user + 1).to(tl.int64):
        return
    items = first + tl.arange(0, ITEMS)
    inside = items < length
    rows = History + (start + items)[:, None] * stride_h
    # Products are summed at the end: every item is rounded the same way, so ties stay ties.
    total = tl.zeros((ITEMS, WIDE), dtype=tl.float32)
    for low in tl.static_range(0, SIZE, WIDE):
        places = low + tl.arange(0, WIDE)
        held = places < SIZE
        item = tl.load(rows + places[None, :], mask=inside[:, None] & held[None, :], other=0.0)
        wanted = tl.load(Candidates + candidate * stride_c + places, mask=held, other=0.0)
        total += item.to(tl.float32) * wanted.to(tl.float32)[None, :]
    tl.store(Scores + start + items, tl.sum(total, axis=1), mask=inside)


@triton.jit
def _score_many_kernel(History, Candidates, HistoryOffsets, CandidateOffsets, Scores,
                       stride_h, stride_c, pitch, blocks, groups,
                       SIZE: tl.constexpr, WIDE: tl.constexpr, ITEMS: tl.constexpr,
                       GROUP: tl.constexpr):  # fmt: skip
    # The groups of candidates over one block of items are neighbours: they share its reads.
    group = tl.program_id(0) % groups
    block = tl.program_id(0) // groups % blocks
    user = tl.program_id(0) // groups // blocks
    start = tl.load(HistoryOffsets + user).to(tl.int64)
    length = (tl.load(HistoryOffsets + user + 1).to(tl.int64) - start).to(tl.int32)
    first_candidate = tl.load(CandidateOffsets + user).to(tl.int64) + group * GROUP
    last_candidate = tl.load(CandidateOffsets + user + 1).to(tl.int64)
    first = block * ITEMS
    if first >= length or first_candidate >= last_candidate:
        return
    items = first + tl.arange(0, ITEMS)
    candidates = first_candidate + tl.arange(0, GROUP)
    inside = items < length
    wanted = candidates < last_candidate
    total = tl.zeros((GROUP, ITEMS), dtype=tl.float32)
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


@triton.jit
def _add_three(a, b, c, d, e, f):
    return a + d, b + e, c + f


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
def _select_kernel(Scores, HistoryOffsets, CandidateOffsets, HistoryTimes, CandidateTimes,
                   Anchors, Visible, Found, Counts, pitch, max_candidates,
                   TOP_K: tl.constexpr, ANCHORS: tl.constexpr, RADIUS: tl.constexpr,
                   RECENT: tl.constexpr, EXTRA: tl.constexpr, TIMED: tl.constexpr,
                   FLAT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    user = tl.program_id(0) // max_candidates
    candidate = tl.load(CandidateOffsets + user).to(tl.int64) + tl.program_id(0) % max_candidates
    if tl.program_id(0) == 0:
        tl.store(Counts, 0)
    if candidate >= tl.load(CandidateOffsets + user + 1).to(tl.int64):
        return
    start = tl.load(HistoryOffsets + user).to(tl.int64)
    length = (tl.load(HistoryOffsets + user + 1).to(tl.int64) - start).to(tl.int32)
    items = tl.arange(0, BLOCK)
    seen = items < length
    if TIMED:
        now = tl.load(CandidateTimes + candidate)
        seen = seen & (tl.load(HistoryTimes + start + items, mask=seen, other=0) < now)
    visible = tl.sum(seen.to(tl.int32))
    row = Scores + (start if FLAT else candidate * pitch)
    score = tl.load(row + items, mask=seen, other=0.0)
    # The order of floats as the order of integers; -0 is 0, what is not seen comes last.
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    key = tl.where(seen, bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x80000000)
    found = tl.minimum(visible, TOP_K)

    # The largest threshold that at least `found` keys reach; done early when exactly that many.
    # Three tries at a time: a count waits for all warps, comparing costs next to nothing.
    low = tl.min(tl.where(seen, key, 0x7FFFFFFF)).to(tl.int64)
    high = tl.max(key).to(tl.int64)
    if found == 0 or found == visible:
        high = low
    while low < high:
        step = (high - low + 3) // 4
        first = low + step
        second = tl.minimum(first + step, high)
        third = tl.minimum(second + step, high)
        reach_first, reach_second, reach_third = tl.reduce(
            (
                (key >= first.to(tl.int32)).to(tl.int32),
                (key >= second.to(tl.int32)).to(tl.int32),
                (key >= third.to(tl.int32)).to(tl.int32),
            ),
            0,
            _add_three,
        )
        if reach_third >= found:
            low = third
            high = tl.where(reach_third == found, third, high)
        elif reach_second >= found:
            low = second
            high = tl.where(reach_second == found, second, third - 1)
        elif reach_first >= found:
            low = first
            high = tl.where(reach_first == found, first, second - 1)
        else:
            high = first - 1
    threshold = low.to(tl.int32)
    above = seen & (key > threshold)
    tied = seen & (key == threshold)
    spare = found - tl.sum(above.to(tl.int32))
    num_tied = tl.sum(tied.to(tl.int32))
    chosen = above | tied
    if num_tied != spare:
        older = tl.cumsum(tied.to(tl.int32), 0)
        chosen = above | (tied & (num_tied - older < spare))
    chosen = chosen & (found > 0)
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(Anchors + candidate * max(TOP_K, 1) + place, items, mask=chosen)
    tl.debug_barrier()

    newest = tl.minimum(visible, RECENT)
    _, _, count = _anchor_ranges(
        Anchors, candidate, found, visible - newest, TOP_K, ANCHORS, RADIUS
    )
    tl.store(Visible + candidate, visible)
    tl.store(Found + candidate, found)
    tl.store(Counts + 1 + candidate, (tl.sum(count) + newest + EXTRA).to(tl.int64))


@triton.jit
def _write_kernel(Anchors, Visible, Found, Offsets, Table, HistoryOffsets, CandidateOffsets,
                  Index, Weights, num_items, max_candidates, max_history,
                  TOP_K: tl.constexpr, ANCHORS: tl.constexpr, RADIUS: tl.constexpr,
                  RECENT: tl.constexpr, EXTRA: tl.constexpr, REACH: tl.constexpr,
                  NEWEST: tl.constexpr, MATRIX: tl.constexpr):  # fmt: skip
    user = tl.program_id(0) // max_candidates
    candidate = tl.load(CandidateOffsets + user).to(tl.int64) + tl.program_id(0) % max_candidates
    if candidate >= tl.load(CandidateOffsets + user + 1).to(tl.int64):
        return
    start = tl.load(HistoryOffsets + user).to(tl.int64)
    visible = tl.load(Visible + candidate)
    newest = tl.minimum(visible, RECENT)
    limit = visible - newest
    anchor, low, count = _anchor_ranges(
        Anchors, candidate, tl.load(Found + candidate), limit, TOP_K, ANCHORS, RADIUS
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
