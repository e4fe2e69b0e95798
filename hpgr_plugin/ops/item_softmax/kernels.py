"""Softmax and its slope in place: a program reads its row twice and writes it once."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _load(Row, Bias, places, size, BIAS: tl.constexpr):
    score = tl.load(Row + places, mask=places < size, other=float("-inf")).to(tl.float32)
    if BIAS:
        score += tl.load(Bias + places, mask=places < size, other=0.0).to(tl.float32)
    return score


@triton.jit
def _row_statistics(Scores, Bias, start, size, BIAS: tl.constexpr, BLOCK: tl.constexpr,
                    LANE: tl.constexpr):  # fmt: skip
    """Maximum, at least `start`, and the sum of exponentials above it."""
    lanes = tl.arange(0, BLOCK)
    # A maximum and a sum per lane: threads wait for each other only at the end of the row.
    tops = tl.zeros((BLOCK // LANE,), dtype=tl.float32) + start
    totals = tl.zeros((BLOCK // LANE,), dtype=tl.float32)
    for first in range(0, size, BLOCK):
        score = _load(Scores, Bias, first + lanes, size, BIAS)
        score = tl.reshape(score, (BLOCK // LANE, LANE))
        higher = tl.maximum(tops, tl.max(score, axis=1))
        powers = tl.sum(tl.exp(score - higher[:, None]), axis=1)
        totals = totals * tl.exp(tops - higher) + powers
        tops = higher
    top = tl.max(tops)
    return top, tl.sum(totals * tl.exp(tops - top))


@triton.jit
def _write_slope(Scores, Bias, normaliser, target, size, BIAS: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    lanes = tl.arange(0, BLOCK)
    for first in range(0, size, BLOCK):
        places = first + lanes
        slope = tl.exp(_load(Scores, Bias, places, size, BIAS) - normaliser)
        slope = tl.where(places == target, slope - 1.0, slope)
        tl.store(Scores + places, slope.to(Scores.dtype.element_ty), mask=places < size)


@triton.jit
def shard_statistics_kernel(Scores, Targets, Tops, Totals, TargetScores, size, pitch,
                            BLOCK: tl.constexpr, LANE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    Scores += row * pitch
    target = tl.load(Targets + row)
    target_score = tl.load(Scores + target, mask=target >= 0, other=float("-inf")).to(tl.float32)
    # A finite start: before the first block, and in lanes past the end, -inf would give nan.
    start = tl.load(Scores).to(tl.float32)
    top, total = _row_statistics(Scores, Scores, start, size, False, BLOCK, LANE)
    tl.store(Tops + row, top)
    tl.store(Totals + row, total)
    tl.store(TargetScores + row, target_score)


@triton.jit
def shard_slope_kernel(Scores, Targets, Normalisers, size, pitch,
                       BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target, normaliser = tl.load(Targets + row), tl.load(Normalisers + row)
    _write_slope(Scores + row * pitch, Scores, normaliser, target, size, False, BLOCK)


@triton.jit
def softmax_slope_kernel(Scores, Targets, Bias, Losses, Hits, size, pitch, BIAS: tl.constexpr,
                         SLOPE: tl.constexpr, BLOCK: tl.constexpr,
                         LANE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    Scores += row * pitch
    target = tl.load(Targets + row)
    target_score = tl.load(Scores + target).to(tl.float32)
    if BIAS:
        target_score += tl.load(Bias + target).to(tl.float32)
    top, total = _row_statistics(Scores, Bias, target_score, size, BIAS, BLOCK, LANE)
    normaliser = top + tl.log(total)
    tl.store(Losses + row, normaliser - target_score)
    tl.store(Hits + row, target_score >= top)
    if SLOPE:
        _write_slope(Scores, Bias, normaliser, target, size, BIAS, BLOCK)
