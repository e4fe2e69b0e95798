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
def softmax_slope_kernel(Scores, Targets, Bias, Losses, Hits, size, pitch, BIAS: tl.constexpr,
                         SLOPE: tl.constexpr, BLOCK: tl.constexpr,
                         LANE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    Scores += row * pitch
    target = tl.load(Targets + row)
    target_score = tl.load(Scores + target).to(tl.float32)
    if BIAS:
        target_score += tl.load(Bias + target).to(tl.float32)
    lanes = tl.arange(0, BLOCK)
    # A maximum and a sum per lane: threads wait for each other only at the end of the row.
    tops = tl.zeros((BLOCK // LANE,), dtype=tl.float32) + target_score
    totals = tl.zeros((BLOCK // LANE,), dtype=tl.float32)
    for first in range(0, size, BLOCK):
        score = _load(Scores, Bias, first + lanes, size, BIAS)
        score = tl.reshape(score, (BLOCK // LANE, LANE))
        higher = tl.maximum(tops, tl.max(score, axis=1))
        powers = tl.sum(tl.exp(score - higher[:, None]), axis=1)
        totals = totals * tl.exp(tops - higher) + powers
        tops = higher
    top = tl.max(tops)
    normaliser = top + tl.log(tl.sum(totals * tl.exp(tops - top)))
    tl.store(Losses + row, normaliser - target_score)
    tl.store(Hits + row, target_score >= top)
    if SLOPE:
        for first in range(0, size, BLOCK):
            places = first + lanes
            slope = tl.exp(_load(Scores, Bias, places, size, BIAS) - normaliser)
            slope = tl.where(places == target, slope - 1.0, slope)
            tl.store(Scores + places, slope.to(Scores.dtype.element_ty), mask=places < size)
