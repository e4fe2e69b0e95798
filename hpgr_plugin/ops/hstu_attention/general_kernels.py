"""Kernels for a bias by position and time, an explicit visibility, chosen rows and any weights.

A program owns one block of rows (forward, dq) or of columns (dk and dv) of one head of one
sequence, as in `kernels.py`, and passes over the blocks that it need not look at. Times are
subtracted as int64, and buckets are found in integers. The pass over rows also sums the gradient of
the tables: one partial sum for each program, so that nothing is added atomically.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from hpgr_plugin.ops.hstu_attention.kernels import (
    _load,
    _sequence,
    _silu_block,
    _silu_block_with_slope,
    _store,
)

_NOTHING = tl.constexpr(-(2**62))  # the order of a query that sees only itself


@triton.jit
def _rows_of_block(first, QueryRows, QueryOrder, QueryPositions, Times, start, length, query_start,
                   query_length, ROWS: tl.constexpr, CHOSEN: tl.constexpr, ORDERS: tl.constexpr,
                   BIAS: tl.constexpr):  # fmt: skip
    """Rows, the column that each is, its order, position and time, [ROWS] each; and their range.

    The range is what `_any_seen` needs: the lowest and the highest column, and the highest order.
    """
    rows = first + tl.arange(0, ROWS)
    inside = rows < query_length
    own = rows + (length - query_length)
    if CHOSEN:
        token = tl.load(QueryRows + query_start + rows, mask=inside, other=0).to(tl.int64)
        own = (token - start).to(tl.int32)
    at = start + own
    order = at
    position = own
    time = at
    if ORDERS:
        order = tl.load(QueryOrder + at, mask=inside, other=_NOTHING).to(tl.int64)
    if BIAS:
        position = tl.load(QueryPositions + at, mask=inside, other=0).to(tl.int32)
        time = tl.load(Times + at, mask=inside, other=0).to(tl.int64)
    low = tl.min(tl.where(inside, own, 2**30))
    high = tl.max(tl.where(inside, own, -1))
    return rows, own, order, position, time, low, high, tl.max(order)


@triton.jit
def _columns_of_block(first, KeyOrder, Positions, Times, Weights, start, length,
                      COLUMNS: tl.constexpr, ORDERS: tl.constexpr, BIAS: tl.constexpr,
                      WEIGHTS: tl.constexpr):  # fmt: skip
    """Columns, their order, position, time and weight, [COLUMNS] each; their end, least order."""
    columns = first + tl.arange(0, COLUMNS)
    inside = columns < length
    at = start + columns
    order = at
    position = columns
    time = at
    weight = columns.to(tl.float32)
    if ORDERS:
        order = tl.load(KeyOrder + at, mask=inside, other=2**62).to(tl.int64)
    if BIAS:
        position = tl.load(Positions + at, mask=inside, other=0).to(tl.int32)
        time = tl.load(Times + at, mask=inside, other=0).to(tl.int64)
    if WEIGHTS:
        weight = tl.load(Weights + at, mask=inside, other=0.0)
    high = tl.minimum(first + COLUMNS, length)
    return columns, order, position, time, weight, high, tl.min(order)


@triton.jit
def _any_seen(low, high, own_low, own_high, key_low, order_high, ORDERS: tl.constexpr,
              CROSS: tl.constexpr):  # fmt: skip
    """Whether a row with one of these orders and own columns may see a column of [low, high)."""
    if CROSS:
        seen = high > low
    elif ORDERS:
        seen = (key_low < order_high) | ((low <= own_high) & (high > own_low))
    else:
        seen = low <= own_high
    return seen


@triton.jit
def _seen(own, query_order, columns, key_order, length, history, ORDERS: tl.constexpr,
          CROSS: tl.constexpr, TARGETS: tl.constexpr):  # fmt: skip
    """Whether rows see columns, [ROWS, COLUMNS]."""
    same = own[:, None] == columns[None, :]
    if ORDERS:
        seen = (key_order[None, :] < query_order[:, None]) | same
    elif CROSS:
        seen = (own[:, None] > -(2**30)) & (columns[None, :] >= 0)
    elif TARGETS:
        seen = ((own[:, None] >= columns[None, :]) & (columns[None, :] < history)) | same
    else:
        seen = own[:, None] >= columns[None, :]
    return seen & (columns[None, :] < length)


@triton.jit
def _buckets(row_position, row_time, column_position, column_time, Distances, FAR: tl.constexpr,
             TIMES: tl.constexpr):  # fmt: skip
    """Buckets of the distances in positions and in time, int32 [ROWS, COLUMNS]."""
    distance = row_position[:, None] - column_position[None, :]
    distance = tl.minimum(tl.maximum(distance, -FAR), FAR)
    position = tl.load(Distances + distance + FAR)
    apart = row_time[:, None] - column_time[None, :]
    apart = tl.where(apart < 0, -apart, apart) + 1
    if TIMES <= 32:  # no bucket beyond tells these apart
        apart = tl.minimum(apart, 2**32 - 1).to(tl.uint32)
    # The exponent of the rounded float, less one where it was rounded up to a power of two.
    exponent = (apart.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    exponent = tl.where((apart >> exponent.to(apart.dtype)) == 0, exponent - 1, exponent)
    return position, tl.minimum(exponent, TIMES - 1)


@triton.jit
def _weights(rows, columns, weight, Matrix, pitch, weight_start, first_weighted, query_length,
             length, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MATRIX: tl.constexpr,
             WEIGHTS: tl.constexpr):  # fmt: skip
    """M [ROWS, COLUMNS]."""
    m = tl.full((ROWS, COLUMNS), 1.0, dtype=tl.float32)
    if MATRIX:
        held = ((rows >= first_weighted) & (rows < query_length))[:, None]
        held = held & (columns < length)[None, :]
        at = (weight_start + rows - first_weighted)[:, None] * pitch + columns[None, :]
        m = tl.load(Matrix + at, mask=held, other=1.0)
    if WEIGHTS:
        m = m * weight[None, :]
    return m


@triton.jit
def _scores(q, k, position, time, key_position, key_time, Distances, PositionTable, TimeTable,
            alpha, BIAS: tl.constexpr, FAR: tl.constexpr, TIMES: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """Scaled scores with their bias, and the buckets of both; [ROWS, COLUMNS] each."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * alpha
    near = position[:, None] - key_position[None, :]
    far = near
    if BIAS:
        near, far = _buckets(position, time, key_position, key_time, Distances, FAR, TIMES)
        scores += tl.load(PositionTable + near) + tl.load(TimeTable + far)
    return scores, near, far


@triton.jit
def _keys_and_values(K, V, columns, length, stride_kt, stride_vt, D: tl.constexpr,
                     DV: tl.constexpr):  # fmt: skip
    k = _load(K, columns, length, stride_kt, D, True)
    return k, _load(V, columns, length, stride_vt, DV, True)


@triton.jit
def _sequence_of_program(Q, K, V, Offsets, QueryOffsets, Targets, WeightOffsets, num_blocks,
                         stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
                         H: tl.constexpr, SUFFIX: tl.constexpr, TARGETS: tl.constexpr,
                         SOME: tl.constexpr):  # fmt: skip
    """What `_sequence` says; where its weights start, and its first row with any; Q, K, V there."""
    pid = tl.program_id(0)
    block, head, start, length, query_start, query_length, history = _sequence(
        pid, num_blocks, Offsets, QueryOffsets, Targets, H, SUFFIX, TARGETS
    )
    weight_start = query_start
    first_weighted = 0
    if SOME:
        of_sequence = WeightOffsets + pid // num_blocks // H
        weight_start = tl.load(of_sequence).to(tl.int64)
        count = (tl.load(of_sequence + 1).to(tl.int64) - weight_start).to(tl.int32)
        first_weighted = query_length - count
    Q += query_start * stride_qt + head * stride_qh
    K += start * stride_kt + head * stride_kh
    V += start * stride_vt + head * stride_vh
    return (block, head, start, length, query_start, query_length, history, weight_start,
            first_weighted, Q, K, V)  # fmt: skip


@triton.jit
def general_forward_kernel(
    Q, K, V, Out, Offsets, QueryOffsets, Targets, QueryRows, KeyOrder, QueryOrder, Positions,
    QueryPositions, Times, Distances, PositionTable, TimeTable, Weights, Matrix, WeightOffsets,
    pitch, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    num_blocks, alpha, inverse_norm,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SUFFIX: tl.constexpr, CHOSEN: tl.constexpr, CROSS: tl.constexpr, TARGETS: tl.constexpr,
    ORDERS: tl.constexpr, BIAS: tl.constexpr, WEIGHTS: tl.constexpr, MATRIX: tl.constexpr,
    SOME: tl.constexpr, PRE: tl.constexpr, FAR: tl.constexpr, TIMES: tl.constexpr,
    APPROXIMATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    (block, head, start, length, query_start, query_length, history, weight_start, first_weighted,
     Q, K, V) = _sequence_of_program(
        Q, K, V, Offsets, QueryOffsets, Targets, WeightOffsets, num_blocks, stride_qt, stride_qh,
        stride_kt, stride_kh, stride_vt, stride_vh, H, SUFFIX, TARGETS, SOME,
    )  # fmt: skip
    first_row = (num_blocks - 1 - block) * ROWS
    if first_row >= query_length:
        return
    rows, own, order, position, time, own_low, own_high, order_high = _rows_of_block(
        first_row, QueryRows, QueryOrder, QueryPositions, Times, start, length, query_start,
        query_length, ROWS, CHOSEN, ORDERS, BIAS,
    )  # fmt: skip
    q = _load(Q, rows, query_length, stride_qt, D, True)
    acc = tl.zeros((ROWS, DV), dtype=tl.float32)
    for first in tl.range(0, length, COLUMNS):
        columns, key_order, key_position, key_time, weight, high, key_low = _columns_of_block(
            first, KeyOrder, Positions, Times, Weights, start, length, COLUMNS, ORDERS, BIAS,
            WEIGHTS,
        )  # fmt: skip
        if _any_seen(first, high, own_low, own_high, key_low, order_high, ORDERS, CROSS):
            k, v = _keys_and_values(K, V, columns, length, stride_kt, stride_vt, D, DV)
            scores, _, _ = _scores(q, k, position, time, key_position, key_time, Distances,
                                   PositionTable, TimeTable, alpha, BIAS, FAR, TIMES,
                                   PRECISION)  # fmt: skip
            m = _weights(rows, columns, weight, Matrix, pitch, weight_start, first_weighted,
                         query_length, length, ROWS, COLUMNS, MATRIX, WEIGHTS)  # fmt: skip
            if PRE:
                scores = scores * m
            attention = _silu_block(scores, 1.0, APPROXIMATE)
            if not PRE:
                attention = attention * m
            seen = _seen(own, order, columns, key_order, length, history, ORDERS, CROSS, TARGETS)
            attention = tl.where(seen, attention, 0.0)
            acc = tl.dot(attention.to(v.dtype), v, acc, input_precision=PRECISION)
    Out += query_start * stride_ot + head * stride_oh
    _store(Out, acc * inverse_norm, rows, query_length, stride_ot, DV)


@triton.jit
def _d_scores(q, k, v, grad, rows, own, order, position, time, columns, key_order, key_position,
              key_time, weight, Distances, PositionTable, TimeTable, Matrix, pitch, weight_start,
              first_weighted, query_length, length, history, alpha, ROWS: tl.constexpr,
              COLUMNS: tl.constexpr, CROSS: tl.constexpr, TARGETS: tl.constexpr,
              ORDERS: tl.constexpr, BIAS: tl.constexpr, WEIGHTS: tl.constexpr,
              MATRIX: tl.constexpr, PRE: tl.constexpr, FAR: tl.constexpr, TIMES: tl.constexpr,
              APPROXIMATE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Attention weights, gradient of the scores before M, what is seen, and buckets.

    [ROWS, COLUMNS] each.
    """
    m = _weights(rows, columns, weight, Matrix, pitch, weight_start, first_weighted,
                 query_length, length, ROWS, COLUMNS, MATRIX, WEIGHTS)  # fmt: skip
    seen = _seen(own, order, columns, key_order, length, history, ORDERS, CROSS, TARGETS)
    scores, near, far = _scores(q, k, position, time, key_position, key_time, Distances,
                                PositionTable, TimeTable, alpha, BIAS, FAR, TIMES,
                                PRECISION)  # fmt: skip
    if PRE:
        scores = scores * m
    attention, slope = _silu_block_with_slope(scores, 1.0, APPROXIMATE)
    d_attention = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    if not PRE:
        attention = attention * m
    d_scores = tl.where(seen, d_attention * slope * m, 0.0)
    return tl.where(seen, attention, 0.0), d_scores, seen, near, far


@triton.jit
def _add_by_bucket(sums, values, buckets, seen, WIDE: tl.constexpr):
    """Add values [ROWS, COLUMNS] to sums [ROWS, WIDE] by their buckets.

    A block holds few buckets, unless it lies on the diagonal: only those in its range are met.
    """
    low = tl.min(tl.min(tl.where(seen, buckets, WIDE), 1))
    high = tl.max(tl.max(tl.where(seen, buckets, -1), 1))
    places = tl.arange(0, WIDE)
    for bucket in tl.range(low, high + 1):
        total = tl.sum(tl.where(buckets == bucket, values, 0.0), 1)
        sums += tl.where(places[None, :] == bucket, total[:, None], 0.0)
    return sums


@triton.jit
def general_backward_rows_kernel(
    Q, K, V, Grad, DQ, Partial, Offsets, QueryOffsets, Targets, QueryRows, KeyOrder, QueryOrder,
    Positions, QueryPositions, Times, Distances, PositionTable, TimeTable, Weights, Matrix,
    WeightOffsets, pitch, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_gt, stride_gh, stride_dt, stride_dh, num_blocks, alpha, inverse_norm,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SUFFIX: tl.constexpr, CHOSEN: tl.constexpr, CROSS: tl.constexpr, TARGETS: tl.constexpr,
    ORDERS: tl.constexpr, BIAS: tl.constexpr, WEIGHTS: tl.constexpr, MATRIX: tl.constexpr,
    SOME: tl.constexpr, PRE: tl.constexpr, FAR: tl.constexpr, TIMES: tl.constexpr,
    APPROXIMATE: tl.constexpr, PRECISION: tl.constexpr, POSITIONS: tl.constexpr,
    POSITIONS_WIDE: tl.constexpr, TIMES_WIDE: tl.constexpr,
):  # fmt: skip
    (block, head, start, length, query_start, query_length, history, weight_start, first_weighted,
     Q, K, V) = _sequence_of_program(
        Q, K, V, Offsets, QueryOffsets, Targets, WeightOffsets, num_blocks, stride_qt, stride_qh,
        stride_kt, stride_kh, stride_vt, stride_vh, H, SUFFIX, TARGETS, SOME,
    )  # fmt: skip
    first_row = (num_blocks - 1 - block) * ROWS
    if first_row >= query_length:
        return
    rows, own, order, position, time, own_low, own_high, order_high = _rows_of_block(
        first_row, QueryRows, QueryOrder, QueryPositions, Times, start, length, query_start,
        query_length, ROWS, CHOSEN, ORDERS, BIAS,
    )  # fmt: skip
    Grad += query_start * stride_gt + head * stride_gh
    q = _load(Q, rows, query_length, stride_qt, D, True)
    grad = _load(Grad, rows, query_length, stride_gt, DV, True)
    dq = tl.zeros((ROWS, D), dtype=tl.float32)
    by_position = tl.zeros((ROWS, POSITIONS_WIDE), dtype=tl.float32)
    by_time = tl.zeros((ROWS, TIMES_WIDE), dtype=tl.float32)
    for first in tl.range(0, length, COLUMNS):
        columns, key_order, key_position, key_time, weight, high, key_low = _columns_of_block(
            first, KeyOrder, Positions, Times, Weights, start, length, COLUMNS, ORDERS, BIAS,
            WEIGHTS,
        )  # fmt: skip
        if _any_seen(first, high, own_low, own_high, key_low, order_high, ORDERS, CROSS):
            k, v = _keys_and_values(K, V, columns, length, stride_kt, stride_vt, D, DV)
            _, d_scores, seen, near, far = _d_scores(
                q, k, v, grad, rows, own, order, position, time, columns, key_order, key_position,
                key_time, weight, Distances, PositionTable, TimeTable, Matrix, pitch, weight_start,
                first_weighted, query_length, length, history, alpha, ROWS, COLUMNS, CROSS,
                TARGETS, ORDERS, BIAS, WEIGHTS, MATRIX, PRE, FAR, TIMES, APPROXIMATE, PRECISION,
            )  # fmt: skip
            dq = tl.dot(d_scores.to(k.dtype), k, dq, input_precision=PRECISION)
            if BIAS:
                seen = seen & (rows < query_length)[:, None]
                by_position = _add_by_bucket(by_position, d_scores, near, seen, POSITIONS_WIDE)
                by_time = _add_by_bucket(by_time, d_scores, far, seen, TIMES_WIDE)
    DQ += query_start * stride_dt + head * stride_dh
    _store(DQ, dq * (alpha * inverse_norm), rows, query_length, stride_dt, D)
    if BIAS:
        Partial += tl.program_id(0).to(tl.int64) * (POSITIONS + TIMES)
        _store_sums(Partial, by_position, inverse_norm, POSITIONS, POSITIONS_WIDE)
        _store_sums(Partial + POSITIONS, by_time, inverse_norm, TIMES, TIMES_WIDE)


@triton.jit
def _store_sums(Sums, values, factor, COUNT: tl.constexpr, WIDE: tl.constexpr):
    """Write the sums over rows of values [ROWS, WIDE], times a factor, to COUNT places."""
    places = tl.arange(0, WIDE)
    tl.store(Sums + places, tl.sum(values, 0) * factor, mask=places < COUNT)


@triton.jit
def general_backward_columns_kernel(
    Q, K, V, Grad, DK, DV_, Offsets, QueryOffsets, Targets, QueryRows, KeyOrder, QueryOrder,
    Positions, QueryPositions, Times, Distances, PositionTable, TimeTable, Weights, Matrix,
    WeightOffsets, pitch, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_gt, stride_gh, stride_dkt, stride_dkh, stride_dvt, stride_dvh, num_blocks, alpha,
    inverse_norm,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SUFFIX: tl.constexpr, CHOSEN: tl.constexpr, CROSS: tl.constexpr, TARGETS: tl.constexpr,
    ORDERS: tl.constexpr, BIAS: tl.constexpr, WEIGHTS: tl.constexpr, MATRIX: tl.constexpr,
    SOME: tl.constexpr, PRE: tl.constexpr, FAR: tl.constexpr, TIMES: tl.constexpr,
    APPROXIMATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    (block, head, start, length, query_start, query_length, history, weight_start, first_weighted,
     Q, K, V) = _sequence_of_program(
        Q, K, V, Offsets, QueryOffsets, Targets, WeightOffsets, num_blocks, stride_qt, stride_qh,
        stride_kt, stride_kh, stride_vt, stride_vh, H, SUFFIX, TARGETS, SOME,
    )  # fmt: skip
    first_column = block * COLUMNS
    if first_column >= length:
        return
    columns, key_order, key_position, key_time, weight, high, key_low = _columns_of_block(
        first_column, KeyOrder, Positions, Times, Weights, start, length, COLUMNS, ORDERS, BIAS,
        WEIGHTS,
    )  # fmt: skip
    Grad += query_start * stride_gt + head * stride_gh
    k, v = _keys_and_values(K, V, columns, length, stride_kt, stride_vt, D, DV)
    dk = tl.zeros((COLUMNS, D), dtype=tl.float32)
    dv = tl.zeros((COLUMNS, DV), dtype=tl.float32)
    for first in tl.range(0, query_length, ROWS):
        rows, own, order, position, time, own_low, own_high, order_high = _rows_of_block(
            first, QueryRows, QueryOrder, QueryPositions, Times, start, length, query_start,
            query_length, ROWS, CHOSEN, ORDERS, BIAS,
        )  # fmt: skip
        if _any_seen(first_column, high, own_low, own_high, key_low, order_high, ORDERS, CROSS):
            q = _load(Q, rows, query_length, stride_qt, D, True)
            grad = _load(Grad, rows, query_length, stride_gt, DV, True)
            attention, d_scores, _, _, _ = _d_scores(
                q, k, v, grad, rows, own, order, position, time, columns, key_order, key_position,
                key_time, weight, Distances, PositionTable, TimeTable, Matrix, pitch, weight_start,
                first_weighted, query_length, length, history, alpha, ROWS, COLUMNS, CROSS,
                TARGETS, ORDERS, BIAS, WEIGHTS, MATRIX, PRE, FAR, TIMES, APPROXIMATE, PRECISION,
            )  # fmt: skip
            dv = tl.dot(tl.trans(attention.to(grad.dtype)), grad, dv, input_precision=PRECISION)
            dk = tl.dot(tl.trans(d_scores.to(q.dtype)), q, dk, input_precision=PRECISION)
    DK += start * stride_dkt + head * stride_dkh
    DV_ += start * stride_dvt + head * stride_dvh
    _store(DK, dk * (alpha * inverse_norm), columns, length, stride_dkt, D)
    _store(DV_, dv * inverse_norm, columns, length, stride_dvt, DV)
