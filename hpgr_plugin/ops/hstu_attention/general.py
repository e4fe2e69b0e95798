"""Launches of `general_kernels.py`: what the plain kernels of `triton.py` leave out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hpgr_plugin.ops.dispatch import dot_precision
from hpgr_plugin.ops.hstu_attention.buckets import buckets_by_distance
from hpgr_plugin.ops.hstu_attention.general_kernels import (
    general_backward_columns_kernel,
    general_backward_rows_kernel,
    general_forward_kernel,
)
from hpgr_plugin.ops.hstu_attention.spec import AttentionSpec, PositionTimeBias


class Blocks(NamedTuple):
    """Sizes of one program: rows, columns and warps."""

    rows: int
    columns: int
    warps: int


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    spec: AttentionSpec,
    bias: PositionTimeBias | None,
) -> None:
    """Write `output` `[Tq, H, dv]`; rows beyond the last sequence stay as they are."""
    blocks = _blocks(q, v, spec)
    num_blocks = triton.cdiv(spec.query_length, blocks.rows)
    _launch(general_forward_kernel, num_blocks, (q, k, v, output), (), spec, bias, blocks)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    spec: AttentionSpec,
    bias: PositionTimeBias | None,
) -> tuple[Tensor, Tensor] | None:
    """Write dq, dk and dv, and return the gradients of both tables in float32, or None."""
    dq, dk, dv = gradients
    blocks = _blocks(q, v, spec)
    num_blocks = triton.cdiv(spec.max_length, blocks.columns)
    tensors = q, k, v, grad
    _launch(general_backward_columns_kernel, num_blocks, (*tensors, dk, dv), (), spec, bias, blocks)
    num_blocks = triton.cdiv(spec.query_length, blocks.rows)
    partial = q  # never written without a bias
    sizes = [0, 0] if bias is None else [len(table) for table in bias[:2]]
    if bias is not None:
        programs = num_blocks * (len(spec.offsets) - 1) * q.shape[1]
        partial = q.new_zeros(programs, sum(sizes), dtype=torch.float32)
    _launch(
        general_backward_rows_kernel, num_blocks, (*tensors, dq), (partial,), spec, bias, blocks
    )
    if bias is None:
        return None
    by_position, by_time = partial.sum(0).split(sizes)
    return by_position, by_time


def _blocks(q: Tensor, v: Tensor, spec: AttentionSpec) -> Blocks:
    rows = 16 if spec.query_length <= 16 else 64
    if max(q.shape[2], v.shape[2]) > 128 or q.dtype == torch.float32:
        return Blocks(min(rows, 32), 32, 4)
    return Blocks(rows, 32, 4)


def _launch(
    kernel: Any,
    num_blocks: int,
    tensors: tuple[Tensor, ...],
    partial: tuple[Tensor, ...],
    spec: AttentionSpec,
    bias: PositionTimeBias | None,
    blocks: Blocks,
) -> None:
    """Run a kernel on `num_blocks` blocks of every head of every sequence; q, k, v come first."""
    q, k, v = tensors[:3]
    programs = num_blocks * (len(spec.offsets) - 1) * q.shape[1]
    if programs == 0:
        return
    kernel[(programs,)](
        *tensors,
        *partial,
        *_arguments(spec, bias, q),
        *(stride for x in tensors for stride in (x.stride(0), x.stride(1))),
        num_blocks,
        spec.alpha,
        1.0 / spec.norm_length,
        **_constants(q, k, v, spec, bias, blocks),
    )


def _arguments(
    spec: AttentionSpec, bias: PositionTimeBias | None, q: Tensor
) -> tuple[Tensor | int, ...]:
    """Pointers in kernel order; what is absent is never read, so any tensor will do."""
    places, sight = spec.places, spec.visibility
    whole, real = spec.offsets, q

    def integers(x: Tensor | None) -> Tensor:
        return whole if x is None else x.contiguous()

    def floats(x: Tensor | None) -> Tensor:
        return real if x is None else x.float().contiguous()

    matrix = floats(spec.row_weights)
    if bias is None or places is None:
        position, query_position, timestamp = None, None, None
    else:
        position, query_position, timestamp = places.positions, places.of_queries, places.timestamps
    return (
        spec.offsets,
        integers(spec.query_offsets),
        integers(spec.num_targets),
        integers(spec.query_rows),
        integers(None if sight is None else sight.key_order),
        integers(None if sight is None else sight.query_order),
        integers(position),
        integers(query_position),
        integers(timestamp),
        whole if bias is None else buckets_by_distance(bias, q.device),
        floats(None if bias is None else bias.position_table),
        floats(None if bias is None else bias.time_table),
        floats(spec.column_weights),
        matrix,
        integers(spec.weight_offsets),
        0 if spec.row_weights is None else matrix.stride(0),
    )


def _constants(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    bias: PositionTimeBias | None,
    blocks: Blocks,
) -> dict[str, Any]:
    positions, times = (1, 1) if bias is None else (len(table) for table in bias[:2])
    return {
        "H": q.shape[1],
        "D": q.shape[2],
        "DV": v.shape[2],
        "ROWS": blocks.rows,
        "COLUMNS": blocks.columns,
        "SUFFIX": spec.query_offsets is not None,
        "CHOSEN": spec.query_rows is not None,
        "CROSS": not spec.causal and spec.visibility is None,
        "TARGETS": spec.num_targets is not None and spec.visibility is None,
        "ORDERS": spec.visibility is not None,
        "BIAS": bias is not None,
        "WEIGHTS": spec.column_weights is not None,
        "MATRIX": spec.row_weights is not None,
        "SOME": spec.weight_offsets is not None,
        "PRE": spec.mask_position == "pre",
        "FAR": 1 if bias is None else 64 * bias.exact_positions,
        "POSITIONS": positions,
        "TIMES": times,
        "POSITIONS_WIDE": triton.next_power_of_2(positions),
        "TIMES_WIDE": triton.next_power_of_2(times),
        "APPROXIMATE": q.is_cuda and q.dtype != torch.float32,
        "PRECISION": dot_precision(q.dtype, q.device),
        "num_warps": blocks.warps,
        "num_stages": 2,
    }
