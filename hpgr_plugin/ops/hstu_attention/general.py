"""Launches of `general_kernels.py`: what the plain kernels of `triton.py` leave out."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from hpgr_plugin.ops.hstu_attention.buckets import buckets_by_distance
from hpgr_plugin.ops.hstu_attention.general_kernels import (
    general_backward_columns_kernel,
    general_backward_rows_kernel,
    general_forward_kernel,
)
from hpgr_plugin.ops.hstu_attention.launch import Blocks, launch
from hpgr_plugin.ops.hstu_attention.spec import AttentionSpec, PositionTimeBias


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    spec: AttentionSpec,
    bias: PositionTimeBias | None,
) -> None:
    """Write `output` `[Tq, H, dv]`; rows beyond the last sequence stay as they are."""
    _launch(general_forward_kernel, (q, k, v, output), (), spec, bias)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    spec: AttentionSpec,
    bias: PositionTimeBias | None,
) -> tuple[Tensor, ...]:
    """Write dq, dk and dv, and return the gradients in float32 of both tables, where there are."""
    dq, dk, dv = gradients
    tensors = q, k, v, grad
    _launch(general_backward_columns_kernel, (*tensors, dk, dv), (), spec, bias, by_column=True)
    partial = q  # never written without a bias
    sizes = [1, 1] if bias is None else [len(table) for table in bias[:2]]
    if bias is not None:
        num_blocks = triton.cdiv(spec.query_length, _blocks(q, v, spec).rows)
        programs = num_blocks * (len(spec.offsets) - 1) * q.shape[1]
        partial = q.new_zeros(programs, sum(sizes), dtype=torch.float32)
    _launch(
        general_backward_rows_kernel,
        (*tensors, dq),
        (partial,),
        spec,
        bias,
        POSITIONS=sizes[0],
        POSITIONS_WIDE=triton.next_power_of_2(sizes[0]),
        TIMES_WIDE=triton.next_power_of_2(sizes[1]),
    )
    return () if bias is None else partial.sum(0).split(sizes)


def _blocks(q: Tensor, v: Tensor, spec: AttentionSpec) -> Blocks:
    rows = 16 if spec.query_length <= 16 else 64
    if max(q.shape[2], v.shape[2]) > 128 or q.dtype == torch.float32:
        return Blocks(min(rows, 32), 32, 4, 2)
    return Blocks(rows, 32, 4, 2)


def _launch(
    kernel: Any,
    tensors: tuple[Tensor, ...],
    partial: tuple[Tensor, ...],
    spec: AttentionSpec,
    bias: PositionTimeBias | None,
    *,
    by_column: bool = False,
    **constants: int,
) -> None:
    """Run a kernel whose programs own rows, or columns, of the sequences; q, k, v come first."""
    q, v = tensors[0], tensors[2]
    blocks = _blocks(q, v, spec)
    num_blocks = triton.cdiv(spec.query_length, blocks.rows)
    if by_column:
        num_blocks = triton.cdiv(spec.max_length, blocks.columns)
    launch(
        kernel,
        num_blocks,
        tensors,
        (*partial, *_arguments(spec, bias, q)),
        spec,
        blocks,
        CHOSEN=spec.query_rows is not None,
        CROSS=not spec.causal and spec.visibility is None,
        TARGETS=spec.num_targets is not None and spec.visibility is None,
        ORDERS=spec.visibility is not None,
        BIAS=bias is not None,
        WEIGHTS=spec.column_weights is not None,
        SOME=spec.weight_offsets is not None,
        PRE=spec.mask_position == "pre",
        FAR=1 if bias is None else 64 * bias.exact_positions,
        TIMES=1 if bias is None else len(bias.time_table),
        **constants,
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
