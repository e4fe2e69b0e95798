"""HSTU attention in plain torch over padded sequences: any device and float dtype.

The scores of a few sequences at a time are made, used and dropped, so that on a CPU they stay in
its cache; the backward makes them again instead of reading them from memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hpgr_plugin.ops.hstu_attention.buckets import buckets_by_distance, time_buckets
from hpgr_plugin.ops.hstu_attention.spec import AttentionSpec, PositionTimeBias
from hpgr_plugin.ops.jagged import dense_to_jagged, jagged_to_padded_dense, ranges

_SCORES_OF_PART = 2**17  # of one head, on a CPU


def hstu_attention(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, *, bias: PositionTimeBias | None = None
) -> Tensor:
    """The operator's torch backend, see `hpgr_plugin.ops.hstu_attention`."""
    query_offsets = spec.offsets if spec.query_offsets is None else spec.query_offsets
    padded_q = _pad(q, query_offsets, spec.query_length, spec.padded)
    padded_k = _pad(k, spec.offsets, spec.max_length, spec.padded)
    padded_v = _pad(v, spec.offsets, spec.max_length, spec.padded)
    joint = None
    if bias is not None:
        joint = bias.position_table.unsqueeze(1) + bias.time_table.unsqueeze(0)
        joint = joint.flatten()
    parts = _parts(spec, bias, q.dtype)
    output: Tensor = _Attention.apply(padded_q, padded_k, padded_v, joint, parts, spec.alpha)
    if spec.padded:
        return output.flatten(0, 1)
    return dense_to_jagged(output, query_offsets, q.shape[0])


class Part(NamedTuple):
    """What the scores of some sequences meet, the same in every layer of a step.

    Attributes:
        rows: these sequences.
        gain: what `SiLU(s)` is multiplied by, `[b, R or 1, N]`: who sees whom, 1/n, M outside.
        inside: M `[b, R or 1, N]` inside of the SiLU, or None.
        buckets: joint buckets of the bias, int32 `[b, R, N]`, or None.
    """

    rows: slice
    gain: Tensor
    inside: Tensor | None
    buckets: Tensor | None

    def scores(
        self, q: Tensor, k: Tensor, bias: Tensor | None, alpha: float, *, last: bool
    ) -> Tensor:
        """What goes into the SiLU, `[b, R, N]`, from q `[b, R, d]` and k `[b, N, d]`.

        Args:
            last: b is not needed again, so it may be overwritten.
        """
        if bias is None:
            scores = torch.bmm(q, k.mT).mul_(alpha)
        else:
            scores = torch.baddbmm(bias, q, k.mT, alpha=alpha, out=bias if last else None)
        return scores if self.inside is None else scores.mul_(self.inside.to(scores.dtype))

    def bias(self, joint: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """b `[b, R, N]` of one layer."""
        if joint is None or self.buckets is None:
            return None
        return joint.to(dtype).index_select(0, self.buckets.flatten()).view(self.buckets.shape)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        joint: Tensor | None,
        parts: list[Part],
        alpha: float,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, joint)
        ctx.parts, ctx.alpha = parts, alpha
        output = v.new_empty(*q.shape[:3], v.shape[3])
        with torch.autocast(q.device.type, enabled=False):
            for part in parts:
                bias = part.bias(joint, q.dtype)
                qs, ks, vs, outs = (x[part.rows] for x in (q, k, v, output))
                for h in range(q.shape[2]):
                    last = h == q.shape[2] - 1
                    scores = part.scores(qs[:, :, h], ks[:, :, h], bias, alpha, last=last)
                    attention = _times(F.silu(scores, inplace=True), part.gain, v.dtype)
                    outs[:, :, h] = torch.bmm(attention, vs[:, :, h])
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, joint = ctx.saved_tensors
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        # double: the sum runs over millions of pairs
        d_joint = None if joint is None else torch.zeros_like(joint, dtype=torch.float64)
        for part in ctx.parts:
            d_bias = _backward_of_part(part, (q, k, v, grad), (dq, dk, dv), joint, ctx.alpha)
            if d_joint is not None and part.buckets is not None:
                index, weights = part.buckets.flatten(), d_bias.flatten().double()
                d_joint += torch.bincount(index, weights, minlength=len(d_joint))
        return dq, dk, dv, None if d_joint is None else d_joint.to(joint.dtype), None, None


def _backward_of_part(
    part: Part,
    tensors: tuple[Tensor, ...],
    gradients: tuple[Tensor, ...],
    joint: Tensor | None,
    alpha: float,
) -> Tensor:
    """Write the gradients of q, k and v of these sequences, and return that of b `[b, R, N]`."""
    bias = part.bias(joint, tensors[0].dtype)
    d_bias = tensors[0].new_zeros(())
    heads = tensors[0].shape[2]
    for h in range(heads):
        q, k, v, grad = (x[part.rows, :, h] for x in tensors)
        dq, dk, dv = (x[part.rows, :, h] for x in gradients)
        scores = part.scores(q, k, bias, alpha, last=h == heads - 1)
        attention = _times(F.silu(scores), part.gain, v.dtype)
        dv.copy_(torch.bmm(attention.mT, grad))
        d_attention = _times(torch.bmm(grad, v.mT), part.gain, scores.dtype)
        d_scores = torch.ops.aten.silu_backward(d_attention, scores)
        if part.inside is not None:
            d_scores.mul_(part.inside.to(d_scores.dtype))
        dq.copy_(torch.bmm(d_scores, k).mul_(alpha))
        dk.copy_(torch.bmm(d_scores.mT, q).mul_(alpha))
        if bias is not None:
            d_bias = d_scores if h == 0 else d_bias.add_(d_scores)
    return d_bias


def _times(x: Tensor, gain: Tensor, dtype: torch.dtype) -> Tensor:
    """x times gain, in place where the dtypes allow it."""
    return x.mul_(gain) if x.dtype == gain.dtype == dtype else (x * gain).to(dtype)


def _parts(spec: AttentionSpec, bias: PositionTimeBias | None, dtype: torch.dtype) -> list[Part]:
    """The sequences in parts, derived once per step."""
    exact = torch.promote_types(dtype, torch.float32)
    key: tuple[Any, ...] = ("parts", exact)
    if bias is not None:
        key += (len(bias.position_table), len(bias.time_table), bias.exact_positions)
    if key not in spec.cache:
        spec.cache[key] = list(_make_parts(spec, bias, exact))
    parts: list[Part] = spec.cache[key]
    return parts


def _make_parts(
    spec: AttentionSpec, bias: PositionTimeBias | None, dtype: torch.dtype
) -> Iterator[Part]:
    own = _own_columns(spec)
    sequences, pairs = len(own), own.shape[1] * spec.max_length
    size = max(1, _SCORES_OF_PART // max(1, pairs)) if own.device.type == "cpu" else sequences
    visible, weights = _visible(spec, own), _weights(spec)
    buckets = None if bias is None else _buckets(spec, bias, own)
    for first in range(0, sequences, max(1, size)):
        rows = slice(first, first + size)
        gain = visible(rows).to(dtype).div_(spec.norm_length)
        inside = None if weights is None else weights[rows].to(dtype)
        if inside is not None and spec.mask_position == "post":
            gain, inside = gain.mul_(inside), None
        yield Part(rows, gain, inside, None if buckets is None else buckets(rows))


def bias_buckets(spec: AttentionSpec, bias: PositionTimeBias) -> Tensor:
    """Joint bucket of every query and column, int32 `[B, R, N]`: position times S plus time."""
    return _buckets(spec, bias, _own_columns(spec))(slice(None))


def _buckets(spec: AttentionSpec, bias: PositionTimeBias, own: Tensor) -> Callable[[slice], Tensor]:
    """The joint buckets `[b, R, N]` of some sequences."""
    places, size = spec.places, len(bias.time_table)
    assert places is not None
    positions, times = (_per_slot(spec, x, 0) for x in (places.positions, places.timestamps))
    own_positions = _of_queries(spec, _per_slot(spec, places.of_queries, 0), own)
    own_times = _of_queries(spec, times, own)
    by_distance = buckets_by_distance(bias, own.device) * size
    far = len(by_distance) // 2
    # As int32: a distance is below 2^31.
    own_positions, positions = (
        (x + shift).int() for x, shift in ((own_positions, far), (positions, 0))
    )

    def joint(rows: slice) -> Tensor:
        distance = own_positions[rows].unsqueeze(2) - positions[rows].unsqueeze(1)
        place = distance.clamp_(0, 2 * far)
        seconds = own_times[rows].unsqueeze(2) - times[rows].unsqueeze(1)
        position = by_distance.index_select(0, place.flatten()).view(place.shape)
        return position.add_(time_buckets(seconds, size))

    return joint


def _weights(spec: AttentionSpec) -> Tensor | None:
    """M `[B, R or 1, N]`, or None for ones."""
    parts = []
    if spec.column_weights is not None:
        column = _pad(spec.column_weights.unsqueeze(1), spec.offsets, spec.max_length, spec.padded)
        parts.append(column.mT)
    if spec.row_weights is not None:
        parts.append(_padded_row_weights(spec, spec.row_weights))
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else parts[0] * parts[1]


def _padded_row_weights(spec: AttentionSpec, weights: Tensor) -> Tensor:
    """M of every query `[B, R, N]`."""
    queries = spec.offsets if spec.query_offsets is None else spec.query_offsets
    if spec.weight_offsets is None:
        return _pad(weights, queries, spec.query_length, spec.padded)
    counts = spec.weight_offsets.diff()
    padded = weights.new_ones(len(counts) * spec.query_length, spec.max_length)
    starts = torch.arange(len(counts), device=counts.device) * spec.query_length
    padded[ranges(starts + queries.diff() - counts, counts)] = weights
    return padded.unflatten(0, (len(counts), spec.query_length))


def _visible(spec: AttentionSpec, own: Tensor) -> Callable[[slice], Tensor]:
    """Whether queries of some sequences see a column, bool `[b, R, N]`."""
    columns = torch.arange(spec.max_length, device=own.device)
    lengths = spec.offsets.diff()
    history = lengths if spec.num_targets is None else lengths - spec.num_targets
    if spec.visibility is not None:
        keys = _per_slot(spec, spec.visibility.key_order, torch.iinfo(torch.int64).max)
        orders = _per_slot(spec, spec.visibility.query_order, -1)
        queries = _of_queries(spec, orders, own)

    def visible(rows: slice) -> Tensor:
        mine = own[rows].unsqueeze(2)
        if spec.visibility is not None:
            return _and_itself(keys[rows].unsqueeze(1) < queries[rows].unsqueeze(2), mine)
        inside = (columns < lengths[rows].unsqueeze(1)).unsqueeze(1)
        if not spec.causal:
            return inside.expand(-1, own.shape[1], -1)
        seen = mine >= columns
        if spec.num_targets is not None:
            seen = _and_itself(seen & (columns < history[rows].unsqueeze(1)).unsqueeze(1), mine)
        return seen & inside

    return visible


def _and_itself(seen: Tensor, own: Tensor) -> Tensor:
    """With the column that each query is, `[b, R, 1]`; that of padding is arbitrary."""
    return seen if seen.numel() == 0 else seen.scatter_(2, own.clamp(0, seen.shape[2] - 1), True)


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


def _of_queries(spec: AttentionSpec, slots: Tensor, own: Tensor) -> Tensor:
    """Of values per token `[B, N]`, those of the queries, `[B, R]`."""
    if spec.query_offsets is None:
        return slots
    return slots.gather(1, own.clamp(0, max(0, spec.max_length - 1)))


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
