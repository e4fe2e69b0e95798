"""Softmax over all items in little memory, and its sampled form (Eq. 3)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 25  # logits held at once: 128 MiB in float32


class ItemLosses(NamedTuple):
    """Per scored position: `losses` `[M]`, and `hits` `[M]` bool, no item scored higher."""

    losses: Tensor
    hits: Tensor


def chunked_cross_entropy(
    hidden: Tensor,
    item_table: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> ItemLosses:
    """`-log softmax(hidden @ item_table.T + bias)[target]`, never holding `[M, V]`.

    The forward pass runs over chunks of items with a running log-sum-exp, the backward pass
    computes each chunk's logits again. Products are taken in the autocast dtype where autocast is
    on; sums and exponentials are float32 at least.

    Args:
        hidden: `[M, D]`.
        item_table: `[V, D]`.
        targets: int64 `[M]`, in `[0, V)`.
        bias: `[V]`.
        chunk_elements: the most logits held at once.
    """
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    chunk = max(1, chunk_elements // max(1, len(hidden)))
    losses, hits = _ChunkedCrossEntropy.apply(
        hidden.to(dtype), item_table, bias, targets, min(chunk, len(item_table))
    )
    return ItemLosses(losses, hits)


def sampled_cross_entropy(
    hidden: Tensor,
    item_table: Tensor,
    targets: Tensor,
    negatives: Tensor,
    log_proposal: Tensor,
    bias: Tensor | None = None,
) -> ItemLosses:
    """Softmax cross entropy with the normaliser estimated from shared negatives.

    With K negatives drawn from Q, `Z = exp(s_target) + sum_{j != target} exp(s_j) / (K Q_j)` is
    unbiased: hence each negative's score minus `log(K Q_j)`, the log-Q correction. A negative that
    is the position's own target does not count.

    Args:
        hidden: `[M, D]`.
        item_table: `[V, D]`.
        targets: int64 `[M]`.
        negatives: int64 `[K]`, drawn from Q with replacement.
        log_proposal: `[V]`, log Q.
        bias: `[V]`.
    """
    exact = torch.promote_types(hidden.dtype, torch.float32)
    target_scores = (hidden * F.embedding(targets, item_table)).to(exact).sum(1)
    scores = F.linear(hidden, F.embedding(negatives, item_table)).to(exact)
    if bias is not None:
        target_scores = target_scores + bias[targets]
        scores = scores + bias[negatives]
    correction = log_proposal[negatives] + math.log(len(negatives))
    same = negatives == targets.unsqueeze(1)
    corrected = (scores - correction.to(exact)).masked_fill(same, -torch.inf)
    normaliser = torch.cat([target_scores.unsqueeze(1), corrected], 1).logsumexp(1)
    return ItemLosses(normaliser - target_scores, (scores <= target_scores.unsqueeze(1)).all(1))


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, table: Tensor, bias: Tensor | None, targets: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        top = hidden.new_full((len(hidden),), -torch.inf, dtype=exact)
        total = torch.zeros_like(top)
        target_score = torch.zeros_like(top)
        for start in range(0, len(table), chunk):
            scores = _scores(hidden, table, bias, start, chunk, exact)
            place, inside = _place(targets, start, scores.shape[1])
            target_score = torch.where(inside, scores.gather(1, place).squeeze(1), target_score)
            new_top = torch.maximum(top, scores.amax(1))
            total = total * (top - new_top).exp() + scores.sub_(new_top[:, None]).exp_().sum(1)
            top = new_top
        normaliser = top + total.log()
        hits = target_score >= top
        ctx.save_for_backward(hidden, table, bias, targets, normaliser)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(hits)
        return normaliser - target_score, hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor, _grad_hits: Tensor) -> tuple[Tensor | None, ...]:
        hidden, table, bias, targets, normaliser = ctx.saved_tensors
        exact = normaliser.dtype
        grad_hidden = torch.zeros_like(hidden, dtype=exact)
        grad_table = torch.empty_like(table)
        grad_bias = None if bias is None else torch.empty_like(bias)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(table), ctx.chunk):
                # softmax - one-hot, weighted
                scores = _scores(hidden, table, bias, start, ctx.chunk, exact)
                slope = scores.sub_(normaliser[:, None]).exp_()
                place, inside = _place(targets, start, slope.shape[1])
                slope.scatter_add_(1, place, -inside.to(exact).unsqueeze(1))
                slope.mul_(grad_losses.unsqueeze(1))
                rows = slice(start, start + ctx.chunk)
                if grad_bias is not None:
                    grad_bias[rows] = slope.sum(0)
                slope = slope.to(hidden.dtype)
                grad_hidden += slope @ table[rows].to(hidden.dtype)
                grad_table[rows] = slope.T @ hidden
        return grad_hidden.to(hidden.dtype), grad_table, grad_bias, None, None


def _scores(
    hidden: Tensor, table: Tensor, bias: Tensor | None, start: int, chunk: int, exact: torch.dtype
) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        scores = (hidden @ table[start : start + chunk].to(hidden.dtype).T).to(exact)
    return scores if bias is None else scores.add_(bias[start : start + chunk])


def _place(targets: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Column of each target in this chunk `[M, 1]` (clamped), and whether it is there `[M]`."""
    local = targets - start
    return local.clamp(0, size - 1).unsqueeze(1), (local >= 0) & (local < size)
