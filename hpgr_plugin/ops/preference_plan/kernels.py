"""The kernels of `triton.py`: one program per block of items, or per candidate."""

# mypy: disable-error-code="no-untyped-def,annotation-unchecked"

import triton
import triton.language as tl


@triton.jit
def _history(HistoryOffsets, user):
    """Where the history of a user starts, and its length."""
    start = tl.load(HistoryOffsets + user).to(tl.int64)
    return start, (tl.load(HistoryOffsets + user + 1).to(tl.int64) - start).to(tl.int32)


@triton.jit
def _candidate(CandidateOffsets, max_candidates):
    """The user and candidate of this program, and whether the user has so many candidates."""
    user = tl.program_id(0) // max_candidates
    candidate = tl.load(CandidateOffsets + user).to(tl.int64) + tl.program_id(0) % max_candidates
    return user, candidate, candidate < tl.load(CandidateOffsets + user + 1).to(tl.int64)


@triton.jit
def _visible_history(HistoryOffsets, Visible, user, candidate, TIMED: tl.constexpr):
    """Where the history starts, and how many of its items the candidate sees."""
    start, visible = _history(HistoryOffsets, user)
    if TIMED:
        visible = tl.load(Visible + candidate)
    return start, visible


@triton.jit
def visible_kernel(HistoryTimes, CandidateTimes, HistoryOffsets, CandidateOffsets, Visible,
                   blocks, steps, LANES: tl.constexpr):  # fmt: skip
    """How many items come before each candidate, one binary search per lane."""
    user = tl.program_id(0) // blocks
    candidate = tl.load(CandidateOffsets + user).to(tl.int64)
    candidate += tl.program_id(0) % blocks * LANES + tl.arange(0, LANES)
    there = candidate < tl.load(CandidateOffsets + user + 1).to(tl.int64)
    start, length = _history(HistoryOffsets, user)
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
def score_one_kernel(History, Candidates, HistoryOffsets, CandidateOffsets, Visible, Scores,
                     Maxima, stride_h, stride_c, pitch_m, blocks, SIZE: tl.constexpr,
                     WIDE: tl.constexpr, ITEMS: tl.constexpr, GROUP: tl.constexpr,
                     TIMED: tl.constexpr):  # fmt: skip
    user = tl.program_id(0) // blocks
    candidate = tl.load(CandidateOffsets + user).to(tl.int64)
    start, length = _history(HistoryOffsets, user)
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
def score_many_kernel(History, Candidates, HistoryOffsets, CandidateOffsets, Visible, Scores,
                      Maxima, stride_h, stride_c, pitch, pitch_m, blocks, shares,
                      SIZE: tl.constexpr, WIDE: tl.constexpr, ITEMS: tl.constexpr,
                      CANDIDATES: tl.constexpr, GROUP: tl.constexpr,
                      TIMED: tl.constexpr):  # fmt: skip
    # Programs that differ only in their candidates are neighbours: they share reads of the items.
    share = tl.program_id(0) % shares
    block = tl.program_id(0) // shares % blocks
    user = tl.program_id(0) // shares // blocks
    start, length = _history(HistoryOffsets, user)
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
def _threshold(key, seen, wanted, lowest):
    """The largest threshold that at least `wanted` of the seen keys reach; `wanted` is at least 1.

    `lowest` is a threshold that so many reach. The search ends early when exactly `wanted` do. It
    tries three thresholds at a time: a count waits for all warps, comparing costs little.
    """
    low = tl.maximum(tl.min(tl.where(seen, key, 0x7FFFFFFF)), lowest).to(tl.int64)
    high = tl.max(tl.where(seen, key, -0x80000000)).to(tl.int64)
    while low < high:
        step = (high - low + 3) // 4
        first = low + step
        second = tl.minimum(first + step, high)
        third = tl.minimum(second + step, high)
        # No count exceeds the number of keys, so three counts fit into one sum.
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
    """The `wanted` largest of the seen keys, given their threshold; of equal keys the last."""
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
    """Integers in the order of the scores; -0 equals 0, an item that is not seen is lowest."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(seen, bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x80000000)


@triton.jit
def _ranges(anchor, before, after, limit, first, last, RADIUS: tl.constexpr):
    """The items nearest to each anchor and within RADIUS of it: start and count.

    `before` and `after` are the neighbouring anchors; `first` and `last` mark anchors without one.
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
def select_kernel(Scores, Maxima, Visible, HistoryOffsets, CandidateOffsets, Anchors, Counts,
                  pitch, pitch_m, max_candidates,
                  TOP_K: tl.constexpr, ANCHORS: tl.constexpr, RADIUS: tl.constexpr,
                  RECENT: tl.constexpr, EXTRA: tl.constexpr, TIMED: tl.constexpr,
                  FLAT: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
                  LIKELY: tl.constexpr):  # fmt: skip
    user, candidate, there = _candidate(CandidateOffsets, max_candidates)
    if tl.program_id(0) == 0:
        tl.store(Counts, 0)
    if not there:
        return
    start, visible = _visible_history(HistoryOffsets, Visible, user, candidate, TIMED)
    found = tl.minimum(visible, TOP_K)
    if TOP_K > 0:
        anchors = Anchors + candidate * TOP_K
        slot = tl.arange(0, LIKELY)
        item = slot
        seen = item < visible
        lowest = -0x80000000
        if GROUPS > ANCHORS:
            # The top K items lie in the K groups with the largest maxima (of equal groups the most
            # recent): each of those groups holds an item that ranks above all other groups' items.
            groups = (visible + GROUP - 1) // GROUP
            number = tl.arange(0, GROUPS)
            there = number < groups
            best = tl.load(Maxima + candidate * pitch_m + number, mask=there, other=0.0)
            key = _sortable(best, there)
            wanted = tl.minimum(groups, TOP_K)
            threshold = _threshold(key, there, wanted, lowest)
            chosen = _top(key, there, wanted, threshold)
            lowest = tl.where(groups < found, lowest, threshold)  # as many items reach it
            tl.store(anchors + tl.cumsum(chosen.to(tl.int32), 0) - 1, number, mask=chosen)
            tl.debug_barrier()
            held = slot // GROUP < wanted
            item = tl.load(anchors + slot // GROUP, mask=held, other=0) * GROUP + slot % GROUP
            seen = held & (item < visible)
            tl.debug_barrier()
        row = Scores + (start if FLAT else candidate * pitch)
        key = _sortable(tl.load(row + item, mask=seen, other=0.0), seen)
        chosen = _top(key, seen, found, _threshold(key, seen, found, lowest))
        tl.store(anchors + tl.cumsum(chosen.to(tl.int32), 0) - 1, item, mask=chosen)
        tl.debug_barrier()

    newest = tl.minimum(visible, RECENT)
    _, _, count = _anchor_ranges(
        Anchors, candidate, found, visible - newest, TOP_K, ANCHORS, RADIUS
    )
    tl.store(Counts + 1 + candidate, (tl.sum(count) + newest + EXTRA).to(tl.int64))


@triton.jit
def write_kernel(Anchors, Visible, Offsets, Table, HistoryOffsets, CandidateOffsets,
                 Index, Weights, num_items, max_candidates, max_history,
                 TOP_K: tl.constexpr, ANCHORS: tl.constexpr, RADIUS: tl.constexpr,
                 RECENT: tl.constexpr, EXTRA: tl.constexpr, TIMED: tl.constexpr,
                 REACH: tl.constexpr, NEWEST: tl.constexpr,
                 MATRIX: tl.constexpr):  # fmt: skip
    user, candidate, there = _candidate(CandidateOffsets, max_candidates)
    if not there:
        return
    start, visible = _visible_history(HistoryOffsets, Visible, user, candidate, TIMED)
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
