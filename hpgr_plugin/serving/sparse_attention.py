"""Attention of candidates over the slots that a plan fills with rows of one history."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from hpgr_plugin.ops.hstu_attention import MaskPosition
from hpgr_plugin.serving.kept_rows import UserPlan


@dataclass(frozen=True, eq=False)
class KeptRows:
    """What each of c candidates reads of N rows, context and then history.

    Attributes:
        near: int64 `[W]`, rows that every candidate reads with weight 1.
        index: int64 `[c, S]`, rows of its own; 0 in empty slots.
        weights: `[c, S]`, M_j; 0 in empty slots.
        num_rows: N.
        num_heads: of the attention, H.
    """

    near: Tensor
    index: Tensor
    weights: Tensor
    num_rows: int
    num_heads: int

    @classmethod
    def of(cls, plan: UserPlan, *, context: int, num_rows: int, num_heads: int) -> KeptRows:
        """Of a user's plan, behind the context tokens, all of which are read."""
        device = plan.places.device
        near = torch.arange(len(plan.recent), device=device) + (context + plan.recent.start)
        if context:
            near = torch.cat([torch.arange(context, device=device), near])
        return cls(near, plan.places + context, plan.weights, num_rows, num_heads)

    def take(self, rows: slice) -> KeptRows:
        """Some of the candidates."""
        index, weights = self.index[rows], self.weights[rows]
        return KeptRows(self.near, index, weights, self.num_rows, self.num_heads)

    @property
    def few(self) -> bool:
        """Whether gathering the slots costs less than a product with all rows."""
        return 2 * self.index.shape[1] < self.num_rows

    def dense(self) -> Tensor:
        """The weights of all rows, `[c, N]`."""
        weights = self.weights.new_zeros(len(self.index), self.num_rows)
        return weights.scatter_add_(1, self.index, self.weights).index_fill_(1, self.near, 1.0)

    @cached_property
    def index_of_heads(self) -> Tensor:
        """The slots' rows among those of all heads, one head behind the other, `[H * c, S]`."""
        first = torch.arange(self.num_heads, device=self.index.device) * self.num_rows
        return (first.view(-1, 1, 1) + self.index).flatten(0, 1)

    @cached_property
    def pattern(self) -> Tensor:
        """A CSR matrix `[H * c, H * N]` with an entry for every slot; its values are written to."""
        rows, slots = self.index_of_heads.shape
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
            return torch.sparse_csr_tensor(
                torch.arange(0, rows * slots + 1, max(1, slots)),
                self.index_of_heads.flatten(),
                self.weights.new_zeros(rows * slots),
                (rows, self.num_heads * self.num_rows),
            )


def attend_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: KeptRows,
    *,
    bias: Tensor | None,
    norm_length: float,
    mask_position: MaskPosition,
) -> Tensor:
    """What each candidate takes from its slots, `[c, H * d]`.

    Args:
        q: `[H, c, d]`, scaled.
        k, v: `[H, N, d]`.
        kept: the slots.
        bias: `[c, S]`, or None.
        norm_length: n.
        mask_position: where the weights enter.
    """
    heads, count, width = q.shape
    if not kept.index.numel():
        return q.new_zeros(count, heads * width)
    scores = _scores(q.flatten(0, 1), k.flatten(0, 1), kept).view(heads, *kept.index.shape)
    if bias is not None:
        scores += bias.to(scores.dtype)
    weights = kept.weights.to(scores.dtype)
    if mask_position == "pre":
        scores = F.silu(scores.mul_(weights), inplace=True).mul_(1 / norm_length)
    else:
        scores = F.silu(scores, inplace=True).mul_(weights / norm_length)
    sums = F.embedding_bag(
        kept.index_of_heads,
        v.flatten(0, 1),
        mode="sum",
        per_sample_weights=scores.flatten(0, 1).to(v.dtype),
    )
    return sums.view(heads, count, width).transpose(0, 1).flatten(1)


def _scores(q: Tensor, k: Tensor, kept: KeptRows) -> Tensor:
    """`q . k` of every slot, `[H * c, S]`; q `[H * c, d]`, k `[H * N, d]`."""
    if q.is_cuda:
        near = k[kept.index_of_heads]
        return torch.bmm(near, q.unsqueeze(2)).squeeze(2)
    pattern = kept.pattern
    torch.sparse.sampled_addmm(pattern, q, k.t(), beta=0.0, out=pattern)
    return pattern.values()
