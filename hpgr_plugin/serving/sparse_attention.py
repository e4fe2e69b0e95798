"""Attention of candidates over the rows that a plan keeps of one history, without padding."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hpgr_plugin.ops.jagged import complete_cumsum, ranges, segment_ids
from hpgr_plugin.ops.preference_plan import PreferencePlan


@dataclass(frozen=True)
class KeptRows:
    """A CSR matrix, c candidates by the rows of one history (context first).

    Attributes:
        index: int64 `[P]`, ascending in each row.
        weights: `[P]`, M_j; 1 for context.
        offsets: int64 `[c + 1]`.
        rows: int64 `[P]`, the candidate of each entry.
    """

    index: Tensor
    weights: Tensor
    offsets: Tensor
    rows: Tensor

    @classmethod
    def of(cls, plan: PreferencePlan, chosen: slice, shift: Tensor, context: int) -> KeptRows:
        """Of the candidates `chosen` of a plan.

        Args:
            plan: of a batch.
            chosen: its rows.
            shift: what leads from the plan's columns to those of the history.
            context: context tokens in front of the history; all are kept.
        """
        offsets = plan.offsets[chosen.start : chosen.stop + 1]
        counts = offsets.diff()
        first, last = torch.stack([offsets[0], offsets[-1]]).tolist()
        index = plan.index[first:last].long() + shift
        weights = plan.weights[first:last]
        if context:
            total = complete_cumsum(counts + context)
            entries = last - first + context * len(counts)
            kept = ranges(total[:-1] + context, counts)
            columns = torch.arange(context, device=index.device).repeat(len(counts))
            places = ranges(total[:-1], torch.full_like(counts, context))
            index = index.new_empty(entries).scatter_(0, kept, index).scatter_(0, places, columns)
            weights = weights.new_ones(entries).scatter_(0, kept, weights)
            offsets = total
        else:
            offsets = offsets - first
        return cls(index, weights, offsets, segment_ids(offsets, len(index)))

    def take(self, rows: slice) -> KeptRows:
        """Some of the candidates."""
        first, last = self.offsets[rows.start].item(), self.offsets[rows.stop].item()
        part = slice(int(first), int(last))
        return KeptRows(
            self.index[part],
            self.weights[part],
            self.offsets[rows.start : rows.stop + 1] - first,
            self.rows[part] - rows.start,
        )


def kept_scores(q: Tensor, k: Tensor, kept: KeptRows) -> Tensor:
    """`q . k` of every kept pair, `[H, P]`; q `[H, c, d]`, k `[H, N, d]`."""
    if q.is_cuda:
        near = k.index_select(1, kept.index)
        near *= q.index_select(1, kept.rows)
        return near.sum(2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
        pattern = torch.sparse_csr_tensor(
            kept.offsets, kept.index, q.new_zeros(len(kept.index)), (q.shape[1], k.shape[1])
        )
    products = [
        torch.sparse.sampled_addmm(pattern, queries, keys.t(), beta=0.0).values()
        for queries, keys in zip(q, k, strict=True)
    ]
    return torch.stack(products)


def kept_sums(attention: Tensor, v: Tensor, kept: KeptRows) -> Tensor:
    """The sums of values that `attention` `[H, P]` weighs, `[c, H * d]`; v `[H, N, d]`."""
    sums = [
        F.embedding_bag(
            kept.index,
            values,
            kept.offsets,
            mode="sum",
            per_sample_weights=weights,
            include_last_offset=True,
        )
        for weights, values in zip(attention, v, strict=True)
    ]
    return torch.cat(sums, 1)
