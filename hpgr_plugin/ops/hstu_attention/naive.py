"""HSTU attention as loops over sequences, queries and columns that read like the formula.

Nothing here is meant to be fast: every other backend is checked against it, in value and gradient.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hpgr_plugin.ops.hstu_attention.spec import AttentionSpec, PositionTimeBias


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | AttentionSpec,
    *,
    bias: PositionTimeBias | None = None,
    **fields: Any,
) -> Tensor:
    """The reference of `hpgr_plugin.ops.hstu_attention.hstu_attention`.

    Args:
        q, k: `[T, H, d]`.
        v: `[T, H, dv]`.
        offsets: `[B + 1]`, or a whole spec.
        bias: as in the operator.
        **fields: with plain offsets, the other fields of `AttentionSpec`: `alpha`, `norm_length`,
            `column_weights` and so on.

    Returns:
        `[Tq, H, dv]`.
    """
    spec = offsets if isinstance(offsets, AttentionSpec) else _spec(offsets, fields)
    spec.check(q, k, v, bias)
    rows = [q.new_zeros(v.shape[1:]) for _ in range(len(q))]
    query_offsets = spec.offsets if spec.query_offsets is None else spec.query_offsets
    for b in range(len(spec.offsets) - 1):
        first, end = int(spec.offsets[b]), int(spec.offsets[b + 1])
        for i in range(int(query_offsets[b]), int(query_offsets[b + 1])):
            own = _own_row(spec, i, end - int(query_offsets[b + 1]))
            seen = [j for j in range(first, end) if _sees(spec, b, own, j)]
            if seen:
                rows[i] = _attend(q[i], k, v, spec, bias, (i, own, first), seen)
    return torch.stack(rows) if rows else v.new_zeros(0, *v.shape[1:])


def position_bucket(distance: int, bias: PositionTimeBias) -> int:
    """The row of `position_table` for a distance in positions, query minus key."""
    size = len(bias.position_table) // 2
    bucket = abs(distance)
    if bucket >= bias.exact_positions:
        share = math.log2(bucket / bias.exact_positions) / math.log2(64)
        bucket = bias.exact_positions + int(share * (size - bias.exact_positions))
    return min(bucket, size - 1) + (size if distance < 0 else 0)


def time_bucket(seconds: int, bias: PositionTimeBias) -> int:
    """The row of `time_table` for a difference of times."""
    return min((1 + abs(seconds)).bit_length() - 1, len(bias.time_table) - 1)


def _spec(offsets: Tensor, fields: dict[str, Any]) -> AttentionSpec:
    longest = max(offsets.diff().tolist(), default=0)
    return AttentionSpec(offsets=offsets, **{"max_length": longest, **fields})


def _own_row(spec: AttentionSpec, i: int, shift: int) -> int:
    """The row of k that query i is."""
    return i + shift if spec.query_rows is None else int(spec.query_rows[i])


def _sees(spec: AttentionSpec, b: int, own: int, j: int) -> bool:
    if spec.visibility is not None:
        return bool(spec.visibility.key_order[j] < spec.visibility.query_order[own]) or j == own
    if not spec.causal:
        return True
    targets = 0 if spec.num_targets is None else int(spec.num_targets[b])
    return j == own or (j < own and j < int(spec.offsets[b + 1]) - targets)


def _weight_row(spec: AttentionSpec, i: int) -> int | None:
    """The row of row_weights of query i; None for ones."""
    if spec.weight_offsets is None:
        return i
    queries = (spec.offsets if spec.query_offsets is None else spec.query_offsets).tolist()
    weighted = spec.weight_offsets.tolist()
    b = max(b for b in range(len(queries) - 1) if queries[b] <= i)
    row = weighted[b + 1] - (queries[b + 1] - i)
    return row if row >= weighted[b] else None


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    bias: PositionTimeBias | None,
    place: tuple[int, int, int],
    seen: list[int],
) -> Tensor:
    """One query `[H, d]` over the rows `seen`; `place`: its row of q, its row of k, the first."""
    i, own, first = place
    scores = spec.alpha * torch.einsum("hd,jhd->hj", q, k[seen])
    if bias is not None:
        assert spec.places is not None
        apart = (spec.places.of_queries[own] - spec.places.positions[seen]).tolist()
        seconds = (spec.places.timestamps[own] - spec.places.timestamps[seen]).tolist()
        scores = scores + bias.position_table[[position_bucket(p, bias) for p in apart]]
        scores = scores + bias.time_table[[time_bucket(t, bias) for t in seconds]]
    mask = scores.new_ones(len(seen))
    if spec.column_weights is not None:
        mask = mask * spec.column_weights[seen]
    if spec.row_weights is not None:
        row = _weight_row(spec, i)
        if row is not None:
            mask = mask * spec.row_weights[row, [j - first for j in seen]]
    pre = spec.mask_position == "pre"
    attention = F.silu(mask * scores) if pre else F.silu(scores) * mask
    return torch.einsum("hj,jhd->hd", attention / spec.norm_length, v[seen])
