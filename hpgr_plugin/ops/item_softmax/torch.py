"""Softmax over all items in little memory, and its sampled form (Eq. 3)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hpgr_plugin.ops.dispatch import triton_is_installed

CHUNK_BYTES = 1 << 27  # of logits held at once
CUDA_CHUNK_BYTES = 1 << 30  # there every further chunk adds to the table's gradient in memory


class ItemLosses(NamedTuple):
    """Per scored position: `losses` `[M]`, and `hits` `[M]` bool, no item scored higher."""

    losses: Tensor
    hits: Tensor


class MeanLoss(NamedTuple):
    """Over all scored positions: mean `loss`, and `hits`, how many had no item scored higher."""

    loss: Tensor
    hits: Tensor


def mean_cross_entropy(
    hidden: Tensor,
    item_table: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    chunk_bytes: int | None = None,
) -> MeanLoss:
    """Mean of `-log softmax(hidden @ item_table.T + bias)[target]`, never holding `[M, V]`.

    Runs over chunks of positions. A chunk's logits become their own gradient in place while they
    are there, so a step costs three products, none of them twice; without gradients, one. Products
    are taken in the autocast dtype where autocast is on, exponentials and sums in float32 at least.
    The gradients, `[M, D]` and `[V, D]`, wait for the backward.

    Args:
        hidden: `[M, D]`; no positions cost nothing.
        item_table: `[V, D]`.
        targets: int64 `[M]`, in `[0, V)`.
        bias: `[V]`.
        chunk_bytes: the most logits held at once, at least those of one position.
    """
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    if chunk_bytes is None:
        chunk_bytes = CUDA_CHUNK_BYTES if hidden.is_cuda else CHUNK_BYTES
    rows = max(1, chunk_bytes // max(1, len(item_table) * dtype.itemsize))
    inputs = (hidden, item_table, bias)
    slopes = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    loss, hits = _MeanCrossEntropy.apply(
        hidden.to(dtype), item_table, bias, targets, min(rows, max(1, len(hidden))), slopes
    )
    return MeanLoss(loss, hits)


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


class _MeanCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        table: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: int,
        slopes: bool,
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        loss, hits = hidden.new_zeros((), dtype=exact), targets.new_zeros(())
        grads = _Gradients(hidden, table, bias, exact) if slopes else None
        with torch.autocast(hidden.device.type, enabled=False):
            weight = table.to(hidden.dtype)
            for start in range(0, len(hidden), rows):
                chunk = slice(start, start + rows)
                scores = hidden[chunk] @ weight.T
                softmax = _softmax_slope_kernel if _on_kernels(scores) else softmax_slope
                losses, hit, slope = softmax(scores, targets[chunk], bias, with_slope=slopes)
                loss, hits = loss + losses.sum(), hits + hit.sum()
                if grads is not None:
                    grads.add(chunk, slope, hidden[chunk], weight)
                del scores, slope  # before the next chunk's are made
        ctx.save_for_backward(*(() if grads is None else grads.of_inputs()))
        ctx.dtypes = hidden.dtype, table.dtype, None if bias is None else bias.dtype
        ctx.count = max(1, len(hidden))
        ctx.mark_non_differentiable(hits)
        return loss / ctx.count, hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_hits: Tensor) -> tuple[Tensor | None, ...]:
        share = grad_loss / ctx.count
        grads: list[Tensor | None] = []
        for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            grads.append(None if dtype is None else (grad * share).to(dtype))
        return *grads, None, None, None


class _Gradients:
    """Sums over chunks of the gradients of the summed loss, before they are scaled."""

    def __init__(
        self, hidden: Tensor, table: Tensor, bias: Tensor | None, exact: torch.dtype
    ) -> None:
        self.exact = exact
        self.hidden = torch.empty_like(hidden)
        self.table: Tensor | None = None
        self.bias = None if bias is None else torch.zeros_like(bias, dtype=exact)
        self.empty_table = table

    def add(self, chunk: slice, slope: Tensor, hidden: Tensor, weight: Tensor) -> None:
        if self.bias is not None:
            self.bias += slope.sum(0, dtype=self.exact)
        slope = slope.to(hidden.dtype)
        torch.mm(slope, weight, out=self.hidden[chunk])
        product = slope.T @ hidden
        if self.table is None:
            whole = len(hidden) == len(self.hidden)
            self.table = product if whole else product.to(self.exact)
        else:
            self.table += product

    def of_inputs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        table = torch.zeros_like(self.empty_table) if self.table is None else self.table
        return self.hidden, table, self.bias


def softmax_slope(
    scores: Tensor, targets: Tensor, bias: Tensor | None, *, with_slope: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses `[M]`, hits `[M]`, and the losses' slope by the scores, `softmax - one-hot` `[M, V]`.

    Float32 scores are overwritten. Without `with_slope` the last is unspecified.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if bias is not None:
        scores.add_(bias)
    place = targets.unsqueeze(1)
    target_score = scores.gather(1, place).squeeze(1)
    top = scores.amax(1)
    power = scores.sub_(top.unsqueeze(1)).exp_()
    total = power.sum(1)
    losses = top + total.log() - target_score
    if with_slope:
        power.div_(total.unsqueeze(1))
        power.scatter_add_(1, place, torch.full_like(place, -1, dtype=power.dtype))
    return losses, target_score >= top, power


def _on_kernels(scores: Tensor) -> bool:
    known = scores.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return scores.is_cuda and known and triton_is_installed()


def _softmax_slope_kernel(
    scores: Tensor, targets: Tensor, bias: Tensor | None, *, with_slope: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from hpgr_plugin.ops.item_softmax.triton import softmax_slope_

    losses, hits = softmax_slope_(scores, targets, bias, with_slope=with_slope)
    return losses, hits, scores
