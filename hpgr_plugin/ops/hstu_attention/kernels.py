"""The kernels of `triton.py`.

A program owns one block of rows (forward, dq) or of columns (dk and dv) of one head of one
sequence. SiLU(0) = 0: rows and columns past the end of a sequence are loaded as zeros and need no
mask. Blocks that every row sees run in a loop without masks, the ragged rest in a second one.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _half_tanh(half, APPROXIMATE: tl.constexpr):
    """tanh, since sigmoid(2 x) = (1 + tanh(x)) / 2 needs one special-function operation, not two.

    The approximation has a relative error of 2^-11, below the rounding of scores to bfloat16.
    """
    if APPROXIMATE:
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=tl.float32, is_pure=True, pack=1
        )
    return 2.0 * tl.sigmoid(2.0 * half) - 1.0


@triton.jit
def _sequence(pid, num_blocks, Offsets, QueryOffsets, Targets, H: tl.constexpr,
              SUFFIX: tl.constexpr, TARGETS: tl.constexpr):  # fmt: skip
    """Which block of which head of which sequence, and where that sequence lies."""
    block = pid % num_blocks
    head = (pid // num_blocks) % H
    sequence = pid // num_blocks // H
    start = tl.load(Offsets + sequence).to(tl.int64)
    length = (tl.load(Offsets + sequence + 1).to(tl.int64) - start).to(tl.int32)
    query_start = start
    query_length = length
    if SUFFIX:
        query_start = tl.load(QueryOffsets + sequence).to(tl.int64)
        query_length = (tl.load(QueryOffsets + sequence + 1).to(tl.int64) - query_start).to(
            tl.int32
        )
    history = length
    if TARGETS:
        history = length - tl.load(Targets + sequence).to(tl.int32)
    return block, head, start, length, query_start, query_length, history


@triton.jit
def _silu_block(scores, alpha, APPROXIMATE: tl.constexpr):
    """SiLU of the scaled scores: s sigmoid(s) = s / 2 (1 + tanh(s / 2))."""
    half = scores * (0.5 * alpha)
    return half * _half_tanh(half, APPROXIMATE) + half


@triton.jit
def _silu_block_with_slope(scores, alpha, APPROXIMATE: tl.constexpr):
    """The same, and its derivative by the scaled score s: SiLU'(s) = sig (1 + s (1 - sig))."""
    half = scores * (0.5 * alpha)
    sigmoid = 0.5 * _half_tanh(half, APPROXIMATE) + 0.5
    attention = 2.0 * half * sigmoid
    return attention, sigmoid + attention * (1.0 - sigmoid)


@triton.jit
def _load(X, rows, count, stride, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """Rows `[R, SIZE]` of X; with MASKED, those from `count` on are zero."""
    where = X + rows[:, None] * stride + tl.arange(0, SIZE)[None, :]
    return tl.load(where, mask=rows[:, None] < count, other=0.0) if MASKED else tl.load(where)


@triton.jit
def _store(X, values, rows, count, stride, SIZE: tl.constexpr):
    """Write values `[R, SIZE]` to the rows of X before `count`."""
    where = X + rows[:, None] * stride + tl.arange(0, SIZE)[None, :]
    tl.store(where, values.to(X.dtype.element_ty), mask=rows[:, None] < count)


@triton.jit
def _seen(positions, columns, history, TARGETS: tl.constexpr):
    """Whether the rows at these positions see these columns, both shaped for broadcasting."""
    seen = positions >= columns
    if TARGETS:
        seen = seen & ((columns < history) | (positions == columns))
    return seen


@triton.jit
def _weighted(x, Matrix, positions, columns, length, history, MATRIX: tl.constexpr,
              TARGETS: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """A block `[ROWS, COLUMNS]` times its weights; with MASKED, zero where a row sees nothing."""
    if MATRIX:
        weights = tl.load(Matrix + columns[None, :], mask=columns[None, :] < length, other=0.0)
        x = x * weights
    if MASKED:
        seen = _seen(positions[:, None], columns[None, :], history, TARGETS)
        x = tl.where(seen, x, 0.0)
    return x


@triton.jit
def _row_block(Q, K, V, Matrix, pitch, first_row, head, start, length, query_start, query_length,
               history, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
               D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CROSS: tl.constexpr,
               MATRIX: tl.constexpr):  # fmt: skip
    """Rows, their positions, q, where columns lie, and up to which all or any of them are seen."""
    shift = length if CROSS else length - query_length
    rows = first_row + tl.arange(0, ROWS)
    Q += query_start * stride_qt + head * stride_qh
    K += start * stride_kt + head * stride_kh
    V += start * stride_vt + head * stride_vh
    if MATRIX:
        last_row = tl.maximum(query_length - 1, 0)
        Matrix += (query_start + tl.minimum(rows, last_row))[:, None] * pitch
    q = _load(Q, rows, query_length, stride_qt, D, True)
    # Whole blocks of columns that every one of these rows sees, then the ragged rest.
    free = tl.minimum(first_row + shift + 1, history) // COLUMNS * COLUMNS
    last = tl.minimum(first_row + shift + ROWS, length)
    return rows, rows + shift, q, K, V, Matrix, free, last


@triton.jit
def _forward_columns(acc, q, K, V, Matrix, positions, low, high, length, history,
                     stride_kt, stride_vt, alpha, D: tl.constexpr, DV: tl.constexpr,
                     COLUMNS: tl.constexpr, MATRIX: tl.constexpr,
                     TARGETS: tl.constexpr, APPROXIMATE: tl.constexpr,
                     PRECISION: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    for first in tl.range(low, high, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        k = _load(K, columns, length, stride_kt, D, MASKED)
        v = _load(V, columns, length, stride_vt, DV, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        attention = _silu_block(scores, alpha, APPROXIMATE)
        attention = _weighted(
            attention, Matrix, positions, columns, length, history, MATRIX, TARGETS, MASKED
        )
        acc = tl.dot(attention.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc


@triton.jit
def forward_kernel(Q, K, V, Out, Offsets, QueryOffsets, Targets, Weights,
                   Matrix, pitch,
                   stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
                   stride_ot, stride_oh, num_blocks, alpha, inverse_norm,
                   H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr,
                   COLUMNS: tl.constexpr, SUFFIX: tl.constexpr, CROSS: tl.constexpr,
                   MATRIX: tl.constexpr, TARGETS: tl.constexpr,
                   APPROXIMATE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    block, head, start, length, query_start, query_length, history = _sequence(
        tl.program_id(0), num_blocks, Offsets, QueryOffsets, Targets, H, SUFFIX, TARGETS
    )
    # The last rows read the most columns, so their programs start first.
    first_row = (num_blocks - 1 - block) * ROWS
    if first_row >= query_length:
        return
    rows, positions, q, K, V, Matrix, free, last = _row_block(
        Q, K, V, Matrix, pitch, first_row, head, start, length, query_start, query_length, history,
        stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, D, ROWS, COLUMNS, CROSS,
        MATRIX,
    )  # fmt: skip
    acc = tl.zeros((ROWS, DV), dtype=tl.float32)
    acc = _forward_columns(
        acc, q, K, V, Matrix, positions, 0, free, length, history, stride_kt, stride_vt, alpha,
        D, DV, COLUMNS, MATRIX, TARGETS, APPROXIMATE, PRECISION, False,
    )  # fmt: skip
    acc = _forward_columns(
        acc, q, K, V, Matrix, positions, free, last, length, history, stride_kt, stride_vt, alpha,
        D, DV, COLUMNS, MATRIX, TARGETS, APPROXIMATE, PRECISION, True,
    )  # fmt: skip
    Out += query_start * stride_ot + head * stride_oh
    _store(Out, acc * inverse_norm, rows, query_length, stride_ot, DV)


@triton.jit
def _backward_rows_columns(dq, q, grad, K, V, Matrix, positions, low, high, length, history,
                           stride_kt, stride_vt, alpha, D: tl.constexpr, DV: tl.constexpr,
                           COLUMNS: tl.constexpr, MATRIX: tl.constexpr, TARGETS: tl.constexpr,
                           APPROXIMATE: tl.constexpr, PRECISION: tl.constexpr,
                           MASKED: tl.constexpr):  # fmt: skip
    for first in tl.range(low, high, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        k = _load(K, columns, length, stride_kt, D, MASKED)
        v = _load(V, columns, length, stride_vt, DV, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        d_attention = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        _, slope = _silu_block_with_slope(scores, alpha, APPROXIMATE)
        d_scores = d_attention * slope
        d_scores = _weighted(
            d_scores, Matrix, positions, columns, length, history, MATRIX, TARGETS, MASKED
        )
        dq = tl.dot(d_scores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def backward_rows_kernel(Q, K, V, Grad, DQ, Offsets, QueryOffsets, Targets, Weights,
                         Matrix, pitch,
                         stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
                         stride_gt, stride_gh, stride_dt, stride_dh,
                         num_blocks, alpha, inverse_norm,
                         H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr,
                         COLUMNS: tl.constexpr, SUFFIX: tl.constexpr, CROSS: tl.constexpr,
                         MATRIX: tl.constexpr, TARGETS: tl.constexpr, APPROXIMATE: tl.constexpr,
                         PRECISION: tl.constexpr):  # fmt: skip
    block, head, start, length, query_start, query_length, history = _sequence(
        tl.program_id(0), num_blocks, Offsets, QueryOffsets, Targets, H, SUFFIX, TARGETS
    )
    first_row = (num_blocks - 1 - block) * ROWS
    if first_row >= query_length:
        return
    rows, positions, q, K, V, Matrix, free, last = _row_block(
        Q, K, V, Matrix, pitch, first_row, head, start, length, query_start, query_length, history,
        stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, D, ROWS, COLUMNS, CROSS,
        MATRIX,
    )  # fmt: skip
    Grad += query_start * stride_gt + head * stride_gh
    DQ += query_start * stride_dt + head * stride_dh
    grad = _load(Grad, rows, query_length, stride_gt, DV, True)
    dq = tl.zeros((ROWS, D), dtype=tl.float32)
    dq = _backward_rows_columns(
        dq, q, grad, K, V, Matrix, positions, 0, free, length, history, stride_kt, stride_vt,
        alpha, D, DV, COLUMNS, MATRIX, TARGETS, APPROXIMATE, PRECISION, False,
    )  # fmt: skip
    dq = _backward_rows_columns(
        dq, q, grad, K, V, Matrix, positions, free, last, length, history, stride_kt, stride_vt,
        alpha, D, DV, COLUMNS, MATRIX, TARGETS, APPROXIMATE, PRECISION, True,
    )  # fmt: skip
    _store(DQ, dq * (alpha * inverse_norm), rows, query_length, stride_dt, D)


@triton.jit
def _backward_columns_rows(dk, dv, k, v, Q, Grad, Matrix, columns, low, high,
                           length, query_length, shift, history, stride_qt, stride_gt, pitch,
                           alpha, D: tl.constexpr, DV: tl.constexpr,
                           ROWS: tl.constexpr, MATRIX: tl.constexpr,
                           TARGETS: tl.constexpr, APPROXIMATE: tl.constexpr,
                           PRECISION: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    for first in tl.range(low, high, ROWS):
        rows = first + tl.arange(0, ROWS)
        q = _load(Q, rows, query_length, stride_qt, D, True)
        grad = _load(Grad, rows, query_length, stride_gt, DV, True)
        # Everything is transposed, [COLUMNS, ROWS], as the products below take it.
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        d_attention = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        attention, slope = _silu_block_with_slope(scores, alpha, APPROXIMATE)
        d_scores = d_attention * slope
        if MATRIX:
            where = Matrix + rows[None, :] * pitch + columns[:, None]
            held = (rows[None, :] < query_length) & (columns[:, None] < length)
            weights = tl.load(where, mask=held, other=0.0)
            attention = attention * weights
            d_scores = d_scores * weights
        if MASKED:
            seen = _seen(rows[None, :] + shift, columns[:, None], history, TARGETS)
            attention = tl.where(seen, attention, 0.0)
            d_scores = tl.where(seen, d_scores, 0.0)
        dv = tl.dot(attention.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def backward_columns_kernel(Q, K, V, Grad, DK, DV_, Offsets, QueryOffsets, Targets, Weights,
                            Matrix, pitch,
                            stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
                            stride_gt, stride_gh, stride_dkt, stride_dkh, stride_dvt, stride_dvh,
                            num_blocks, alpha, inverse_norm,
                            H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
                            ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUFFIX: tl.constexpr,
                            CROSS: tl.constexpr, ACCUMULATE: tl.constexpr,
                            SCALE_K: tl.constexpr, SCALE_V: tl.constexpr,
                            MATRIX: tl.constexpr, TARGETS: tl.constexpr,
                            APPROXIMATE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    block, head, start, length, query_start, query_length, history = _sequence(
        tl.program_id(0), num_blocks, Offsets, QueryOffsets, Targets, H, SUFFIX, TARGETS
    )
    # The first columns are read by the most rows, so their programs start first.
    first_column = block * COLUMNS
    if first_column >= length:
        return
    shift = length if CROSS else length - query_length
    columns = first_column + tl.arange(0, COLUMNS)
    Q += query_start * stride_qt + head * stride_qh
    K += start * stride_kt + head * stride_kh
    V += start * stride_vt + head * stride_vh
    Grad += query_start * stride_gt + head * stride_gh
    DK += start * stride_dkt + head * stride_dkh
    DV_ += start * stride_dvt + head * stride_dvh
    in_k = tl.arange(0, D)
    in_v = tl.arange(0, DV)
    inside = columns[:, None] < length
    k = _load(K, columns, length, stride_kt, D, True)
    v = _load(V, columns, length, stride_vt, DV, True)
    Matrix += query_start * pitch
    # From the first row that sees any of these columns; free of masks from the first block
    # of rows that sees all of them, unless there are targets among the columns.
    low = tl.maximum(first_column - shift, 0) // ROWS * ROWS
    free = tl.maximum(first_column + COLUMNS - 1 - shift + ROWS - 1, 0) // ROWS * ROWS
    free = tl.minimum(tl.maximum(free, low), tl.maximum(query_length, low))
    if TARGETS and first_column + COLUMNS > history:
        free = tl.maximum(query_length, low)
    dk = tl.zeros((COLUMNS, D), dtype=tl.float32)
    dv = tl.zeros((COLUMNS, DV), dtype=tl.float32)
    dk, dv = _backward_columns_rows(
        dk, dv, k, v, Q, Grad, Matrix, columns, low, free, length, query_length, shift,
        history, stride_qt, stride_gt, pitch, alpha, D, DV, ROWS,
        MATRIX, TARGETS, APPROXIMATE, PRECISION, True,
    )  # fmt: skip
    dk, dv = _backward_columns_rows(
        dk, dv, k, v, Q, Grad, Matrix, columns, free, query_length, length, query_length,
        shift, history, stride_qt, stride_gt, pitch, alpha, D, DV, ROWS,
        MATRIX, TARGETS, APPROXIMATE, PRECISION, False,
    )  # fmt: skip
    dk = dk * (alpha * inverse_norm)
    dv = dv * inverse_norm
    if SCALE_K or SCALE_V:
        weights = tl.load(Weights + start + columns, mask=columns < length, other=0.0)[:, None]
        if SCALE_K:
            dk = dk * weights
        else:
            dv = dv * weights
    to_k = DK + columns[:, None] * stride_dkt + in_k[None, :]
    to_v = DV_ + columns[:, None] * stride_dvt + in_v[None, :]
    if ACCUMULATE:
        dk += tl.load(to_k, mask=inside, other=0.0).to(tl.float32)
        dv += tl.load(to_v, mask=inside, other=0.0).to(tl.float32)
    tl.store(to_k, dk.to(DK.dtype.element_ty), mask=inside)
    tl.store(to_v, dv.to(DV_.dtype.element_ty), mask=inside)


@triton.jit
def zero_spare_rows_kernel(X, Offsets, num_sequences, num_rows, SIZE: tl.constexpr,
                           WIDE: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    used = tl.load(Offsets + num_sequences).to(tl.int64)
    if first + ROWS <= used:
        return
    rows = first + tl.arange(0, ROWS)
    spare = (rows >= used) & (rows < num_rows)
    zero = tl.zeros((ROWS, WIDE), dtype=X.dtype.element_ty)
    for low in range(0, SIZE, WIDE):
        places = low + tl.arange(0, WIDE)
        where = X + rows[:, None] * SIZE + places[None, :]
        tl.store(where, zero, mask=spare[:, None] & (places < SIZE)[None, :])
