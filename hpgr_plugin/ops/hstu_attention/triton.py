"""HSTU attention over jagged sequences in Triton: forward, and a backward that repeats exactly.

A bias, a visibility and weights by row have kernels of their own, see `general.py`.

Every block of an output has one program, so nothing is added atomically. Column weights never enter
the loops: SiLU(s) M is V with its rows scaled by M, SiLU(M s) is K with its rows scaled, and their
gradient is scaled as it is written. Scores scaled in registers measured 1.5 times slower, forward.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from hpgr_plugin.ops.dispatch import interpreted
from hpgr_plugin.ops.hstu_attention import general
from hpgr_plugin.ops.hstu_attention.kernels import (
    backward_columns_kernel,
    backward_rows_kernel,
    forward_kernel,
    zero_spare_rows_kernel,
)
from hpgr_plugin.ops.hstu_attention.launch import Blocks, launch
from hpgr_plugin.ops.hstu_attention.spec import AttentionSpec, PositionTimeBias
from hpgr_plugin.ops.hstu_layer.rowwise import scale_rows

_SPARE_ROWS = 8  # rows a program looks at


def hstu_attention(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, *, bias: PositionTimeBias | None = None
) -> Tensor:
    """The operator's Triton backend, see `hpgr_plugin.ops.hstu_attention`."""
    output: Tensor
    if bias is None and why_not_plain(q, k, v, spec) is None:
        output = _Attention.apply(q, k, v, _with_float_weights(spec))
    else:
        tables, exact = ((), 0) if bias is None else (bias[:2], bias.exact_positions)
        output = _GeneralAttention.apply(spec, exact, q, k, v, *tables)
    return output


def why_not_plain(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> str | None:
    """Why the kernels without bias and visibility cannot run these arguments, or None."""
    if spec.visibility is not None:
        return "there is an explicit visibility"
    if spec.causal and spec.query_rows is not None:
        return "queries are chosen by query_rows"
    if spec.row_weights is not None and (spec.causal or spec.mask_position == "pre"):
        return "row_weights are known with causal=False and mask_position='post' only"
    if spec.weight_offsets is not None:
        return "only some rows have row_weights"
    return why_not(q, k, v, spec)


def why_not(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, *, bias: PositionTimeBias | None = None
) -> str | None:
    """Why the kernels cannot run these arguments, or None."""
    if not q.is_cuda and not interpreted():
        return f"the tensors are on {q.device.type}, not on a CUDA device"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {q.dtype}"
    for name, size in (("q and k", q.shape[2]), ("v", v.shape[2])):
        if not 16 <= size <= 256 or size & (size - 1):
            return f"the head size of {name} is {size}, no power of two from 16 to 256"
    return None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        q, k, v = (_unit_stride(x) for x in (q, k, v))
        if spec.column_weights is not None and spec.mask_position == "pre":
            k = _scaled(k, spec.column_weights)
        elif spec.column_weights is not None:
            v = _scaled(v, spec.column_weights)
        output = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        zero_spare_rows(output, spec, of_queries=True)
        attention_forward(q, k, v, output, spec)
        ctx.save_for_backward(q, k, v)
        ctx.spec = spec
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = ctx.saved_tensors
        dq, dk, dv = _empty_gradients(q, k, v, ctx.spec)
        attention_backward(_unit_stride(grad), q, k, v, dq, dk, dv, ctx.spec)
        return dq, dk, dv, None


class _GeneralAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, spec: AttentionSpec, exact: int, q: Tensor, k: Tensor, v: Tensor, *tables: Tensor
    ) -> Tensor:
        q, k, v = (_unit_stride(x) for x in (q, k, v))
        output = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        zero_spare_rows(output, spec, of_queries=True)
        general.forward(q, k, v, output, spec, _bias(tables, exact))
        ctx.save_for_backward(q, k, v, *tables)
        ctx.exact = exact
        ctx.spec = spec
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *tables = ctx.saved_tensors
        gradients = _empty_gradients(q, k, v, ctx.spec)
        bias = _bias(tables, ctx.exact)
        totals = general.backward(_unit_stride(grad), q, k, v, gradients, ctx.spec, bias)
        of_tables = (total.to(x.dtype) for total, x in zip(totals, tables, strict=True))
        return None, None, *gradients, *of_tables


def _bias(tables: Sequence[Tensor], exact: int) -> PositionTimeBias | None:
    if not tables:
        return None
    position_table, time_table = tables
    return PositionTimeBias(position_table, time_table, exact)


def _empty_gradients(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv for the kernels to write: zero where they do not."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    zero_spare_rows(dq, spec, of_queries=True)
    zero_spare_rows(dk, spec)
    zero_spare_rows(dv, spec)
    return dq, dk, dv


def _scaled(x: Tensor, weights: Tensor) -> Tensor:
    """Rows of `[T, H, d]` times their weights `[T]`."""
    side_by_side = x.stride(1) == x.shape[2]
    out = x.new_empty(x.shape)
    scale_rows((x if side_by_side else x.contiguous()).flatten(1), weights, out.flatten(1))
    return out


def zero_spare_rows(x: Tensor, spec: AttentionSpec, *, of_queries: bool = False) -> None:
    """Set the rows of a contiguous `[T, ...]` that no sequence owns, and no kernel writes."""
    if spec.exact or len(x) == 0:
        return
    offsets = spec.offsets
    if of_queries and spec.query_offsets is not None:
        offsets = spec.query_offsets
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


def attention_forward(q: Tensor, k: Tensor, v: Tensor, output: Tensor, spec: AttentionSpec) -> None:
    """Write `output` `[Tq, H, dv]`; rows beyond the last sequence stay as they are.

    With column weights, v (k where `pre`) is the one whose rows have been scaled.
    """
    blocks = forward_blocks(q, v, spec)
    num_blocks = triton.cdiv(spec.query_length, blocks.rows)
    _launch(forward_kernel, num_blocks, (q, k, v, output), spec, blocks)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    spec: AttentionSpec,
    *,
    accumulate: bool = False,
) -> None:
    """Write dq, dk and dv; rows beyond the last sequence stay as they are.

    With column weights, k and v are those of the forward, and the gradients those of the rows
    before they were scaled.

    Args:
        accumulate: add to what dk and dv hold.
    """
    by_column, by_row = backward_blocks(q, v, spec)
    _launch(
        backward_columns_kernel,
        triton.cdiv(spec.max_length, by_column.columns),
        (q, k, v, grad, dk, dv),
        spec,
        by_column,
        ACCUMULATE=accumulate,
        SCALE_K=spec.column_weights is not None and spec.mask_position == "pre",
        SCALE_V=spec.column_weights is not None and spec.mask_position == "post",
    )
    num_blocks = triton.cdiv(spec.query_length, by_row.rows)
    _launch(backward_rows_kernel, num_blocks, (q, k, v, grad, dq), spec, by_row)


def _launch(
    kernel: Any,
    num_blocks: int,
    tensors: tuple[Tensor, ...],
    spec: AttentionSpec,
    blocks: Blocks,
    **constants: bool,
) -> None:
    launch(
        kernel,
        num_blocks,
        tensors,
        _sequence_arguments(spec, tensors[0]),
        spec,
        blocks,
        CROSS=not spec.causal,
        TARGETS=spec.num_targets is not None,
        **constants,
    )


def forward_blocks(q: Tensor, v: Tensor, spec: AttentionSpec) -> Blocks:
    """The block sizes that measured best for these sizes."""
    size = max(q.shape[2], v.shape[2])
    if spec.query_length <= 16:
        return Blocks(16, 64, 4, 2)
    if size > 128 or q.dtype == torch.float32:
        return Blocks(64, 32, 4, 2)
    if spec.row_weights is not None:
        return Blocks(64, 64, 8, 2)
    return Blocks(128, 32, 8, 3)


def backward_blocks(q: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Blocks, Blocks]:
    """The same for the pass over columns and the pass over rows of the backward."""
    size = max(q.shape[2], v.shape[2])
    if spec.query_length <= 16:
        return Blocks(16, 64, 4, 2), Blocks(16, 64, 4, 2)
    if size > 128 or q.dtype == torch.float32:
        return Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1)
    if spec.row_weights is not None:
        return Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2)
    if spec.query_length <= 2048:
        return Blocks(32, 64, 4, 3), Blocks(64, 64, 4, 2)
    return Blocks(64, 128, 8, 3), Blocks(128, 64, 8, 3)


def _with_float_weights(spec: AttentionSpec) -> AttentionSpec:
    """Weights as the kernels read them: float32, contiguous rows."""
    changes: dict[str, Tensor] = {}
    if spec.column_weights is not None:
        changes["column_weights"] = spec.column_weights.float().contiguous()
    if spec.row_weights is not None:
        changes["row_weights"] = spec.row_weights.float().contiguous()
    return spec.replace(**changes) if changes else spec


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _sequence_arguments(
    spec: AttentionSpec, q: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """Pointers in kernel order; what is absent is never read, so any tensor will do."""
    absent = spec.offsets
    return (
        spec.offsets,
        absent if spec.query_offsets is None else spec.query_offsets,
        absent if spec.num_targets is None else spec.num_targets,
        q if spec.column_weights is None else spec.column_weights,
        q if spec.row_weights is None else spec.row_weights,
        0 if spec.row_weights is None else spec.row_weights.stride(0),
    )
