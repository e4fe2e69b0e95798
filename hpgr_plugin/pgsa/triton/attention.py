"""HSTU attention over jagged sequences in Triton: forward, and a backward that repeats exactly.

One program owns one block of rows (forward, dq) or of columns (dk and dv) of one head of one
sequence, so nothing is added atomically. SiLU(0) = 0: rows and columns past the end of a
sequence are loaded as zeros and need no mask. Column weights never enter the loops:
SiLU(s) M is V with its rows scaled by M, SiLU(M s) is K with its rows scaled, and their gradient
is scaled as it is written. Scores scaled in registers measured 1.5 times slower, forward.
"""

# mypy: disable-error-code="no-untyped-def"

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpgr_plugin.pgsa.triton.rowwise import scale_rows

_SPARE_ROWS = 8  # rows a program looks at


class Blocks(NamedTuple):
    """Shape of one program: rows, columns, warps and the depth of the load pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


class Shape(NamedTuple):
    """What the kernels must know of the sequences besides q, k and v."""

    offsets: Tensor  # [B + 1]
    query_offsets: Tensor | None  # [B + 1]: q holds the last rows of every sequence
    column_weights: Tensor | None  # [T] float32: of rows that `scale` has been applied to
    num_targets: Tensor | None  # [B]
    max_length: int
    max_query_length: int
    alpha: float
    norm_length: float
    pre: bool = False  # SiLU(M s) instead of SiLU(s) M
    exact: bool = False  # the last sequence ends where the tensors end
    cross: bool = False  # queries are no rows of the sequences: each reads all columns
    matrix: Tensor | None = None  # [Tq, max_length] float32, with `cross`: M by row and column


def triton_hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    max_length: int,
    alpha: float,
    norm_length: float,
    column_weights: Tensor | None = None,
    apply: str = "post",
    num_targets: Tensor | None = None,
    query_offsets: Tensor | None = None,
    max_query_length: int | None = None,
    exact: bool = False,
) -> Tensor:
    """See `ops.hstu_attention`; rows beyond `offsets[-1]` come out zero."""
    shape = Shape(
        offsets=offsets,
        query_offsets=query_offsets,
        column_weights=None if column_weights is None else column_weights.float().contiguous(),
        num_targets=num_targets,
        max_length=max_length,
        max_query_length=max_length if max_query_length is None else max_query_length,
        alpha=alpha,
        norm_length=norm_length,
        pre=apply == "pre",
        exact=exact,
    )
    output: Tensor = _Attention.apply(q, k, v, shape)
    return output


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
        q, k, v = (_unit_stride(x) for x in (q, k, v))
        if shape.column_weights is not None and shape.pre:
            k = _scaled(k, shape.column_weights)
        elif shape.column_weights is not None:
            v = _scaled(v, shape.column_weights)
        output = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        zero_spare_rows(output, shape, of_queries=True)
        attention_forward(q, k, v, output, shape)
        ctx.save_for_backward(q, k, v)
        ctx.shape = shape
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = ctx.saved_tensors
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        zero_spare_rows(dq, ctx.shape, of_queries=True)
        zero_spare_rows(dk, ctx.shape)
        zero_spare_rows(dv, ctx.shape)
        attention_backward(_unit_stride(grad), q, k, v, dq, dk, dv, ctx.shape)
        return dq, dk, dv, None


def _scaled(x: Tensor, weights: Tensor) -> Tensor:
    """Rows of `[T, H, d]` times their weights `[T]`."""
    side_by_side = x.stride(1) == x.shape[2]
    out = x.new_empty(x.shape)
    scale_rows((x if side_by_side else x.contiguous()).flatten(1), weights, out.flatten(1))
    return out


def zero_spare_rows(x: Tensor, shape: Shape, *, of_queries: bool = False) -> None:
    """Set the rows of a contiguous `[T, ...]` that no sequence owns, and no kernel writes."""
    if shape.exact or len(x) == 0:
        return
    offsets = shape.offsets
    if of_queries and shape.query_offsets is not None:
        offsets = shape.query_offsets
    size = x[0].numel()
    _zero_spare_rows_kernel[(triton.cdiv(len(x), _SPARE_ROWS),)](
        x,
        offsets,
        len(offsets) - 1,
        len(x),
        SIZE=size,
        WIDE=min(1024, triton.next_power_of_2(size)),
        ROWS=_SPARE_ROWS,
        num_warps=4,
    )


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, output: Tensor, shape: Shape, blocks: Blocks | None = None
) -> None:
    """Write `output` `[Tq, H, dv]`; rows beyond the last sequence stay as they are.

    With column weights, v (k where `pre`) is the one whose rows have been scaled.
    """
    blocks = blocks or forward_blocks(q, v, shape)
    heads, num_sequences = q.shape[1], shape.offsets.numel() - 1
    num_blocks = triton.cdiv(shape.max_query_length, blocks.rows)
    if num_blocks * num_sequences == 0:
        return
    _forward_kernel[(num_blocks * num_sequences * heads,)](
        q,
        k,
        v,
        output,
        *_sequence_arguments(shape, q),
        *_strides(q, k, v, output),
        num_blocks,
        shape.alpha,
        1.0 / shape.norm_length,
        **_constants(q, k, v, shape, blocks),
    )


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    shape: Shape,
    blocks: tuple[Blocks, Blocks] | None = None,
    *,
    accumulate: bool = False,
) -> None:
    """Write dq, dk and dv; rows beyond the last sequence stay as they are.

    With column weights, k and v are those of the forward, and the gradients those of the rows
    before they were scaled.

    Args:
        accumulate: add to what dk and dv hold.
        blocks: of the pass over columns (dk, dv) and of the pass over rows (dq).
    """
    by_column, by_row = blocks or backward_blocks(q, v, shape)
    heads, num_sequences = q.shape[1], shape.offsets.numel() - 1
    num_blocks = triton.cdiv(shape.max_length, by_column.columns)
    if num_blocks * num_sequences == 0:
        return
    _backward_columns_kernel[(num_blocks * num_sequences * heads,)](
        q,
        k,
        v,
        grad,
        dk,
        dv,
        *_sequence_arguments(shape, q),
        *_strides(q, k, v, grad, dk, dv),
        num_blocks,
        shape.alpha,
        1.0 / shape.norm_length,
        ACCUMULATE=accumulate,
        SCALE_K=shape.column_weights is not None and shape.pre,
        SCALE_V=shape.column_weights is not None and not shape.pre,
        **_constants(q, k, v, shape, by_column),
    )
    num_blocks = triton.cdiv(shape.max_query_length, by_row.rows)
    if num_blocks == 0:
        return
    _backward_rows_kernel[(num_blocks * num_sequences * heads,)](
        q,
        k,
        v,
        grad,
        dq,
        *_sequence_arguments(shape, q),
        *_strides(q, k, v, grad, dq),
        num_blocks,
        shape.alpha,
        1.0 / shape.norm_length,
        **_constants(q, k, v, shape, by_row),
    )


def forward_blocks(q: Tensor, v: Tensor, shape: Shape) -> Blocks:
    """The block shape that measured best for these sizes."""
    size = max(q.shape[2], v.shape[2])
    if shape.max_query_length <= 16:
        return Blocks(16, 64, 4, 2)
    if size > 128 or q.dtype == torch.float32:
        return Blocks(64, 32, 4, 2)
    if shape.matrix is not None:
        return Blocks(64, 64, 8, 2)
    return Blocks(128, 32, 8, 3)


def backward_blocks(q: Tensor, v: Tensor, shape: Shape) -> tuple[Blocks, Blocks]:
    """The same for the pass over columns and the pass over rows of the backward."""
    size = max(q.shape[2], v.shape[2])
    if shape.max_query_length <= 16:
        return Blocks(16, 64, 4, 2), Blocks(16, 64, 4, 2)
    if size > 128 or q.dtype == torch.float32:
        return Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1)
    if shape.matrix is not None:
        return Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2)
    if shape.max_query_length <= 2048:
        return Blocks(32, 64, 4, 3), Blocks(64, 64, 4, 2)
    return Blocks(64, 128, 8, 3), Blocks(128, 64, 8, 3)


@triton.jit
def _zero_spare_rows_kernel(X, Offsets, num_sequences, num_rows, SIZE: tl.constexpr,
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


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _sequence_arguments(
    shape: Shape, q: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """Pointers in kernel order; what is absent is never read, so any tensor stands in."""
    absent = shape.offsets
    return (
        shape.offsets,
        absent if shape.query_offsets is None else shape.query_offsets,
        absent if shape.num_targets is None else shape.num_targets,
        q if shape.column_weights is None else shape.column_weights,
        q if shape.matrix is None else shape.matrix,
        0 if shape.matrix is None else shape.matrix.stride(0),
    )


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in (x.stride(0), x.stride(1))]


def _constants(q: Tensor, k: Tensor, v: Tensor, shape: Shape, blocks: Blocks) -> dict[str, Any]:
    precision = "ieee"
    if q.dtype == torch.float32 and q.is_cuda:
        full = torch.get_float32_matmul_precision() == "highest"
        precision = "tf32x3" if full else "tf32"
    return {
        "H": q.shape[1],
        "D": q.shape[2],
        "DV": v.shape[2],
        "ROWS": blocks.rows,
        "COLUMNS": blocks.columns,
        "SUFFIX": shape.query_offsets is not None,
        "CROSS": shape.cross,
        "MATRIX": shape.matrix is not None,
        "TARGETS": shape.num_targets is not None,
        "APPROXIMATE": q.is_cuda and q.dtype != torch.float32,
        "PRECISION": precision,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


@triton.jit
def _half_tanh(half, APPROXIMATE: tl.constexpr):
    """tanh, for sigmoid(2 x) = (1 + tanh(x)) / 2: one special-function operation, not two.

    The approximation is good to 2^-11, finer than the bfloat16 the scores are rounded to.
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
def _forward_columns(acc, q, K, V, Matrix, positions, low, high, length, history,
                     stride_kt, stride_vt, alpha, D: tl.constexpr, DV: tl.constexpr,
                     COLUMNS: tl.constexpr, MATRIX: tl.constexpr,
                     TARGETS: tl.constexpr, APPROXIMATE: tl.constexpr,
                     PRECISION: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    in_k = tl.arange(0, D)
    in_v = tl.arange(0, DV)
    for first in tl.range(low, high, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        if MASKED:
            inside = columns[:, None] < length
            k = tl.load(K + columns[:, None] * stride_kt + in_k[None, :], mask=inside, other=0.0)
            v = tl.load(V + columns[:, None] * stride_vt + in_v[None, :], mask=inside, other=0.0)
        else:
            k = tl.load(K + columns[:, None] * stride_kt + in_k[None, :])
            v = tl.load(V + columns[:, None] * stride_vt + in_v[None, :])
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        attention = _silu_block(scores, alpha, APPROXIMATE)
        if MATRIX:
            weights = tl.load(Matrix + columns[None, :], mask=columns[None, :] < length, other=0.0)
            attention = attention * weights
        if MASKED:
            seen = positions[:, None] >= columns[None, :]
            if TARGETS:
                own = positions[:, None] == columns[None, :]
                seen = seen & ((columns[None, :] < history) | own)
            attention = tl.where(seen, attention, 0.0)
        acc = tl.dot(attention.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _forward_kernel(Q, K, V, Out, Offsets, QueryOffsets, Targets, Weights,
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
    # The last rows read the most columns: they start first.
    first_row = (num_blocks - 1 - block) * ROWS
    if first_row >= query_length:
        return
    shift = length if CROSS else length - query_length
    rows = first_row + tl.arange(0, ROWS)
    positions = rows + shift
    Q += query_start * stride_qt + head * stride_qh
    K += start * stride_kt + head * stride_kh
    V += start * stride_vt + head * stride_vh
    if MATRIX:
        last_row = tl.maximum(query_length - 1, 0)
        Matrix += (query_start + tl.minimum(rows, last_row))[:, None] * pitch
    in_q = tl.arange(0, D)
    inside = rows[:, None] < query_length
    q = tl.load(Q + rows[:, None] * stride_qt + in_q[None, :], mask=inside, other=0.0)
    # Whole blocks of columns that every one of these rows sees, then the ragged rest.
    free = tl.minimum(first_row + shift + 1, history) // COLUMNS * COLUMNS
    last = tl.minimum(first_row + shift + ROWS, length)
    acc = tl.zeros((ROWS, DV), dtype=tl.float32)
    acc = _forward_columns(
        acc, q, K, V, Matrix, positions, 0, free, length, history, stride_kt, stride_vt, alpha,
        D, DV, COLUMNS, MATRIX, TARGETS, APPROXIMATE, PRECISION, False,
    )  # fmt: skip
    acc = _forward_columns(
        acc, q, K, V, Matrix, positions, free, last, length, history, stride_kt, stride_vt, alpha,
        D, DV, COLUMNS, MATRIX, TARGETS, APPROXIMATE, PRECISION, True,
    )  # fmt: skip
    in_o = tl.arange(0, DV)
    Out += query_start * stride_ot + head * stride_oh
    out = (acc * inverse_norm).to(Out.dtype.element_ty)
    tl.store(Out + rows[:, None] * stride_ot + in_o[None, :], out, mask=inside)


@triton.jit
def _backward_rows_columns(dq, q, grad, K, V, Matrix, positions, low, high, length, history,
                           stride_kt, stride_vt, alpha, D: tl.constexpr, DV: tl.constexpr,
                           COLUMNS: tl.constexpr, MATRIX: tl.constexpr,
                           TARGETS: tl.constexpr, APPROXIMATE: tl.constexpr,
                           PRECISION: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    in_k = tl.arange(0, D)
    in_v = tl.arange(0, DV)
    for first in tl.range(low, high, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        if MASKED:
            inside = columns[:, None] < length
            k = tl.load(K + columns[:, None] * stride_kt + in_k[None, :], mask=inside, other=0.0)
            v = tl.load(V + columns[:, None] * stride_vt + in_v[None, :], mask=inside, other=0.0)
        else:
            k = tl.load(K + columns[:, None] * stride_kt + in_k[None, :])
            v = tl.load(V + columns[:, None] * stride_vt + in_v[None, :])
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        d_attention = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        _, slope = _silu_block_with_slope(scores, alpha, APPROXIMATE)
        d_scores = d_attention * slope
        if MATRIX:
            weights = tl.load(Matrix + columns[None, :], mask=columns[None, :] < length, other=0.0)
            d_scores = d_scores * weights
        if MASKED:
            seen = positions[:, None] >= columns[None, :]
            if TARGETS:
                own = positions[:, None] == columns[None, :]
                seen = seen & ((columns[None, :] < history) | own)
            d_scores = tl.where(seen, d_scores, 0.0)
        dq = tl.dot(d_scores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _backward_rows_kernel(Q, K, V, Grad, DQ, Offsets, QueryOffsets, Targets, Weights,
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
    shift = length if CROSS else length - query_length
    rows = first_row + tl.arange(0, ROWS)
    positions = rows + shift
    Q += query_start * stride_qt + head * stride_qh
    K += start * stride_kt + head * stride_kh
    V += start * stride_vt + head * stride_vh
    Grad += query_start * stride_gt + head * stride_gh
    DQ += query_start * stride_dt + head * stride_dh
    if MATRIX:
        last_row = tl.maximum(query_length - 1, 0)
        Matrix += (query_start + tl.minimum(rows, last_row))[:, None] * pitch
    in_q = tl.arange(0, D)
    in_v = tl.arange(0, DV)
    inside = rows[:, None] < query_length
    q = tl.load(Q + rows[:, None] * stride_qt + in_q[None, :], mask=inside, other=0.0)
    grad = tl.load(Grad + rows[:, None] * stride_gt + in_v[None, :], mask=inside, other=0.0)
    free = tl.minimum(first_row + shift + 1, history) // COLUMNS * COLUMNS
    last = tl.minimum(first_row + shift + ROWS, length)
    dq = tl.zeros((ROWS, D), dtype=tl.float32)
    dq = _backward_rows_columns(
        dq, q, grad, K, V, Matrix, positions, 0, free, length, history, stride_kt, stride_vt,
        alpha, D, DV, COLUMNS, MATRIX, TARGETS, APPROXIMATE, PRECISION, False,
    )  # fmt: skip
    dq = _backward_rows_columns(
        dq, q, grad, K, V, Matrix, positions, free, last, length, history, stride_kt, stride_vt,
        alpha, D, DV, COLUMNS, MATRIX, TARGETS, APPROXIMATE, PRECISION, True,
    )  # fmt: skip
    dq = (dq * (alpha * inverse_norm)).to(DQ.dtype.element_ty)
    tl.store(DQ + rows[:, None] * stride_dt + in_q[None, :], dq, mask=inside)


@triton.jit
def _backward_columns_rows(dk, dv, k, v, Q, Grad, Matrix, columns, low, high,
                           length, query_length, shift, history, stride_qt, stride_gt, pitch,
                           alpha, D: tl.constexpr, DV: tl.constexpr,
                           ROWS: tl.constexpr, MATRIX: tl.constexpr,
                           TARGETS: tl.constexpr, APPROXIMATE: tl.constexpr,
                           PRECISION: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    in_q = tl.arange(0, D)
    in_v = tl.arange(0, DV)
    for first in tl.range(low, high, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = rows[:, None] < query_length
        q = tl.load(Q + rows[:, None] * stride_qt + in_q[None, :], mask=inside, other=0.0)
        grad = tl.load(Grad + rows[:, None] * stride_gt + in_v[None, :], mask=inside, other=0.0)
        # Everything transposed, [COLUMNS, ROWS]: the products below take it as it is.
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
            positions = rows[None, :] + shift
            seen = positions >= columns[:, None]
            if TARGETS:
                seen = seen & ((columns[:, None] < history) | (positions == columns[:, None]))
            attention = tl.where(seen, attention, 0.0)
            d_scores = tl.where(seen, d_scores, 0.0)
        dv = tl.dot(attention.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _backward_columns_kernel(Q, K, V, Grad, DK, DV_, Offsets, QueryOffsets, Targets, Weights,
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
    # The first columns are read by the most rows: they start first.
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
    k = tl.load(K + columns[:, None] * stride_kt + in_k[None, :], mask=inside, other=0.0)
    v = tl.load(V + columns[:, None] * stride_vt + in_v[None, :], mask=inside, other=0.0)
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
