"""HSTU attention over jagged sequences in Triton: forward, and a backward that repeats exactly.

Every block of an output has one program, so nothing is added atomically. Column weights never enter
the loops: SiLU(s) M is V with its rows scaled by M, SiLU(M s) is K with its rows scaled, and their
gradient is scaled as it is written. Scores scaled in registers measured 1.5 times slower, forward.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hpgr_plugin.ops.dispatch import dot_precision
from hpgr_plugin.ops.hstu_attention.kernels import (
    backward_columns_kernel,
    backward_rows_kernel,
    forward_kernel,
    zero_spare_rows_kernel,
)
from hpgr_plugin.ops.hstu_layer.rowwise import scale_rows

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
    mask_position: str = "post",
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
        pre=mask_position == "pre",
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
    zero_spare_rows_kernel[(triton.cdiv(len(x), _SPARE_ROWS),)](
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
    forward_kernel[(num_blocks * num_sequences * heads,)](
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
    backward_columns_kernel[(num_blocks * num_sequences * heads,)](
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
    backward_rows_kernel[(num_blocks * num_sequences * heads,)](
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
        "PRECISION": dot_precision(q.dtype, q.device),
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
