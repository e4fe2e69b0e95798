"""HSTU attention in plain torch over padded `[B, H, R, N]` scores: any device and float dtype."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hpgr_plugin.ops.hstu_attention.spec import AttentionSpec, PositionTimeBias
from hpgr_plugin.ops.jagged import dense_to_jagged, jagged_to_padded_dense


def hstu_attention(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, *, bias: PositionTimeBias | None = None
) -> Tensor:
    """The operator's torch backend, see `hpgr_plugin.ops.hstu_attention`."""
    query_offsets = spec.offsets if spec.query_offsets is None else spec.query_offsets
    padded_q = _pad(q, query_offsets, spec.query_length, spec.padded).transpose(1, 2)
    padded_k = _pad(k, spec.offsets, spec.max_length, spec.padded).transpose(1, 2)
    padded_v = _pad(v, spec.offsets, spec.max_length, spec.padded).transpose(1, 2)

    scores = torch.matmul(padded_q * spec.alpha, padded_k.transpose(2, 3))
    if bias is not None:
        scores = scores + _bias(spec, bias).unsqueeze(1).to(scores.dtype)
    weights = _weights(spec)
    if weights is not None and spec.mask_position == "pre":
        scores = scores * weights.unsqueeze(1).to(scores.dtype)
    attention = (F.silu(scores) * _gain(spec, scores.dtype).unsqueeze(1)).to(padded_v.dtype)
    output = torch.matmul(attention, padded_v).transpose(1, 2)
    if spec.padded:
        return output.flatten(0, 1)
    return dense_to_jagged(output, query_offsets, q.shape[0])


def bias_buckets(spec: AttentionSpec, bias: PositionTimeBias) -> Tensor:
    """Joint bucket of every query and column, int32 `[B, R, N]`: position times S plus time."""
    assert spec.places is not None
    places = spec.places
    positions, times = (_per_slot(spec, x, 0) for x in (places.positions, places.timestamps))
    own_positions = _of_queries(spec, _per_slot(spec, places.of_queries, 0))
    own_times = _of_queries(spec, times)
    distance = own_positions.unsqueeze(2) - positions.unsqueeze(1)
    seconds = (own_times.unsqueeze(2) - times.unsqueeze(1)).abs()
    size = len(bias.time_table)
    time = torch.log2(1.0 + seconds.float()).int().clamp_(max=size - 1)
    return _position_bucket(distance, bias) * size + time


def _position_bucket(distance: Tensor, bias: PositionTimeBias) -> Tensor:
    size, exact = len(bias.position_table) // 2, bias.exact_positions
    near = distance.abs().int()
    far = torch.log2(near.float().clamp(min=1.0) / exact) * ((size - exact) / math.log2(64))
    far = (far.int() + exact).clamp_(max=size - 1)
    bucket = torch.where(near < exact, near, far)
    return torch.where(distance < 0, bucket + size, bucket)


class TableLookup(torch.autograd.Function):
    """`table[index]` for a small table and very many indices.

    The backward of an ordinary lookup sorts the indices; a histogram is one pass.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = table.shape[0]
        return table.index_select(0, index.reshape(-1)).view(index.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        # double: the sum runs over millions of pairs
        total = torch.bincount(index.reshape(-1), grad.reshape(-1).double(), minlength=ctx.size)
        return total.to(grad.dtype), None


def _bias(spec: AttentionSpec, bias: PositionTimeBias) -> Tensor:
    """b `[B, R, N]` of one layer; the buckets are those of all layers."""
    sizes = (len(bias.position_table), len(bias.time_table), bias.exact_positions)
    key = ("buckets", *sizes)
    if key not in spec.cache:
        spec.cache[key] = bias_buckets(spec, bias)
    joint = bias.position_table.unsqueeze(1) + bias.time_table.unsqueeze(0)
    values: Tensor = TableLookup.apply(joint.reshape(-1), spec.cache[key])
    return values


def _gain(spec: AttentionSpec, dtype: torch.dtype) -> Tensor:
    """What `SiLU(s)` is multiplied by, `[B, R or 1, N]`: who sees whom, 1/n, and M outside."""
    exact = torch.promote_types(dtype, torch.float32)
    key = ("gain", exact)
    if key not in spec.cache:
        gain = _visible(spec).to(exact) / spec.norm_length
        weights = _weights(spec)
        if weights is not None and spec.mask_position == "post":
            gain = gain * weights.to(exact)
        spec.cache[key] = gain
    gain_of_step: Tensor = spec.cache[key]
    return gain_of_step


def _weights(spec: AttentionSpec) -> Tensor | None:
    """M `[B, R or 1, N]`, or None for ones."""
    parts = []
    if spec.column_weights is not None:
        column = _pad(spec.column_weights.unsqueeze(1), spec.offsets, spec.max_length, spec.padded)
        parts.append(column.mT)
    if spec.row_weights is not None:
        query_offsets = spec.offsets if spec.query_offsets is None else spec.query_offsets
        parts.append(_pad(spec.row_weights, query_offsets, spec.query_length, spec.padded))
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else parts[0] * parts[1]


def _visible(spec: AttentionSpec) -> Tensor:
    """Whether a query sees a column, bool `[B, R, N]`."""
    columns = torch.arange(spec.max_length, device=spec.offsets.device)
    rows = _own_columns(spec)
    same = rows.unsqueeze(2) == columns
    if spec.visibility is not None:
        key = _per_slot(spec, spec.visibility.key_order, torch.iinfo(torch.int64).max)
        query = _of_queries(spec, _per_slot(spec, spec.visibility.query_order, -1))
        return (key.unsqueeze(1) < query.unsqueeze(2)) | same
    inside = (columns < spec.offsets.diff().unsqueeze(1)).unsqueeze(1)
    if not spec.causal:
        return inside.expand(-1, rows.shape[1], -1)
    seen = rows.unsqueeze(2) >= columns
    if spec.num_targets is not None:
        history = columns < (spec.offsets.diff() - spec.num_targets).unsqueeze(1)
        seen = (seen & history.unsqueeze(1)) | same
    return seen & inside


def _own_columns(spec: AttentionSpec) -> Tensor:
    """The column that each query is, int64 `[B, R]`; arbitrary for padding."""
    place = torch.arange(spec.query_length, device=spec.offsets.device)
    if spec.query_rows is not None:
        assert spec.query_offsets is not None
        rows = _pad_integers(spec.query_rows, spec.query_offsets, spec.query_length, 0)
        return rows - spec.offsets[:-1].unsqueeze(1)
    if spec.query_offsets is None:
        return place.expand(spec.offsets.numel() - 1, -1)
    # The last tokens of their sequence.
    return (spec.offsets.diff() - spec.query_offsets.diff()).unsqueeze(1) + place


def _per_slot(spec: AttentionSpec, tokens: Tensor, fill: int) -> Tensor:
    """One integer per token `[T]`, padded to `[B, N]`."""
    if spec.padded:
        return tokens.view(-1, spec.max_length)
    return _pad_integers(tokens, spec.offsets, spec.max_length, fill)


def _of_queries(spec: AttentionSpec, slots: Tensor) -> Tensor:
    """Of values per token `[B, N]`, those of the queries, `[B, R]`."""
    if spec.query_offsets is None:
        return slots
    return slots.gather(1, _own_columns(spec).clamp(0, max(0, spec.max_length - 1)))


def _pad(values: Tensor, offsets: Tensor, length: int, padded: bool) -> Tensor:
    if padded:
        return values.unflatten(0, (offsets.numel() - 1, length))
    return jagged_to_padded_dense(values, offsets, length)


def _pad_integers(column: Tensor, offsets: Tensor, length: int, fill: int) -> Tensor:
    """Integers `[T]` to `[B, length]`, exact for any int64, unlike a round trip through floats."""
    lengths = offsets.diff()
    padded = column.new_full((lengths.shape[0], length), fill)
    valid = torch.arange(length, device=column.device) < lengths.unsqueeze(1)
    padded[valid] = column[: int(offsets[-1])]
    return padded
