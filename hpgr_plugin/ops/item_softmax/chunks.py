"""The mean cross entropy over chunks of positions, with any kernel for one chunk."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hpgr_plugin.ops.dispatch import product_dtype
from hpgr_plugin.ops.item_softmax.losses import MeanLoss, SoftmaxInputs, total_weight

CHUNK_BYTES = 1 << 27  # of logits in memory at the same time
CUDA_CHUNK_BYTES = 1 << 30  # there every further chunk adds to the table's gradient in memory


class SoftmaxSlope(Protocol):
    """Softmax and its slope for one chunk of scores."""

    def __call__(
        self, scores: Tensor, targets: Tensor, bias: Tensor | None, *, with_slope: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses `[M]`, hits `[M]` and, from scores `[M, V]`, `softmax - one-hot` `[M, V]`.

        The scores may be overwritten. Without `with_slope` the last result is unspecified.
        """


def rows_at_once(hidden: Tensor, num_items: int, chunk_bytes: int | None) -> int:
    """How many positions have their logits over so many items in memory together."""
    if chunk_bytes is None:
        chunk_bytes = CUDA_CHUNK_BYTES if hidden.is_cuda else CHUNK_BYTES
    return max(1, chunk_bytes // max(1, num_items * product_dtype(hidden).itemsize))


def mean_in_chunks(inputs: SoftmaxInputs, softmax_slope: SoftmaxSlope) -> MeanLoss:
    """See `hpgr_plugin.ops.item_softmax.mean_cross_entropy`."""
    hidden, item_table, targets, bias, chunk_bytes, weights = inputs
    rows = rows_at_once(hidden, len(item_table), chunk_bytes)
    learned = (hidden, item_table, bias)
    slopes = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in learned)
    loss, hits = _MeanCrossEntropy.apply(
        hidden.to(product_dtype(hidden)), item_table, bias, targets, weights,
        min(rows, max(1, len(hidden))), slopes, softmax_slope,
    )  # fmt: skip
    return MeanLoss(loss, hits)


class _MeanCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        table: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor | None,
        rows: int,
        slopes: bool,
        softmax_slope: SoftmaxSlope,
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        loss, hits = hidden.new_zeros((), dtype=exact), targets.new_zeros(())
        grads = _Gradients(hidden, table, bias, exact) if slopes else None
        with torch.autocast(hidden.device.type, enabled=False):
            weight = table.to(hidden.dtype)
            for start in range(0, len(hidden), rows):
                chunk = slice(start, start + rows)
                scores = hidden[chunk] @ weight.T
                losses, hit, slope = softmax_slope(scores, targets[chunk], bias, with_slope=slopes)
                if weights is not None:
                    losses = losses * weights[chunk]
                    if slopes:
                        slope.mul_(weights[chunk].to(slope.dtype).unsqueeze(1))
                loss, hits = loss + losses.sum(), hits + hit.sum()
                if grads is not None:
                    grads.add(chunk, slope, hidden[chunk], weight)
                del scores, slope  # before the next chunk's are made
        ctx.save_for_backward(*(() if grads is None else grads.of_inputs()))
        ctx.dtypes = hidden.dtype, table.dtype, None if bias is None else bias.dtype
        ctx.count = total_weight(len(hidden), weights)
        ctx.mark_non_differentiable(hits)
        return loss / ctx.count, hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_hits: Tensor) -> tuple[Tensor | None, ...]:
        share = grad_loss / ctx.count
        grads: list[Tensor | None] = []
        for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            grads.append(None if dtype is None else (grad * share).to(dtype))
        return *grads, None, None, None, None, None


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
