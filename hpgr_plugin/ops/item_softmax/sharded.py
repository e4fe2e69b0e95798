"""The mean cross entropy over a row-wise sharded item table: vocabulary-parallel.

Every process scores the positions of all processes against its own rows. Of a position the
processes exchange three numbers (the largest score, the sum of exponentials, the target's score),
never logits or rows of the table.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hpgr_plugin.ops.collectives import (
    gather_rows,
    largest_over_processes,
    rank,
    row_counts,
    scatter_sum,
    sum_over_processes,
    world_size,
)
from hpgr_plugin.ops.dispatch import product_dtype
from hpgr_plugin.ops.item_softmax.chunks import rows_at_once
from hpgr_plugin.ops.item_softmax.losses import MeanLoss


class ShardInputs(NamedTuple):
    """The arguments of `sharded_cross_entropy`."""

    hidden: Tensor
    shard: Tensor
    targets: Tensor
    first_row: int
    num_items: int
    chunk_bytes: int | None


class ShardStatistics(NamedTuple):
    """Of scores `[M, V_r]`: maximum, sum of exponentials above it, target's score; `[M]` each.

    `scores` are in the form that the kernel's slope reads. A target in another shard scores -inf.
    """

    top: Tensor
    total: Tensor
    target_score: Tensor
    scores: Tensor


class ShardKernel(Protocol):
    """Softmax and its slope over a part of the items; targets elsewhere are -1."""

    def statistics(self, scores: Tensor, targets: Tensor) -> ShardStatistics:
        """Of one shard; the scores may be overwritten."""

    def slope(self, found: ShardStatistics, normaliser: Tensor, targets: Tensor) -> Tensor:
        """`softmax - one-hot` `[M, V_r]` under the normaliser over all shards, float `[M]`."""


def sharded_in_chunks(inputs: ShardInputs, kernel: ShardKernel) -> MeanLoss:
    """See `hpgr_plugin.ops.item_softmax.sharded_cross_entropy`."""
    hidden, shard, targets, first_row, num_items, chunk_bytes = inputs
    # The same number of chunks on every process, whose last shard may be smaller.
    largest = -(-num_items // world_size())
    rows = rows_at_once(hidden, largest, chunk_bytes)
    slopes = torch.is_grad_enabled() and (hidden.requires_grad or shard.requires_grad)
    loss, hits = _ShardedCrossEntropy.apply(
        hidden.to(product_dtype(hidden)), shard, targets, first_row, rows, slopes, kernel
    )
    return MeanLoss(loss, hits)


class _ShardedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        shard: Tensor,
        targets: Tensor,
        first_row: int,
        rows: int,
        slopes: bool,
        kernel: ShardKernel,
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        counts = row_counts(hidden)
        everyones = gather_rows(hidden, counts)
        places = gather_rows(targets, counts) - first_row
        places = torch.where((places >= 0) & (places < len(shard)), places, -1)
        grad_hidden = torch.zeros_like(everyones) if slopes else None
        grad_shard = torch.zeros_like(shard, dtype=exact) if slopes else None
        loss, hits = hidden.new_zeros((), dtype=exact), targets.new_zeros(())
        with torch.autocast(hidden.device.type, enabled=False):
            weight = shard.to(hidden.dtype)
            for process, count in enumerate(counts):
                for start in range(0, count, rows):
                    chunk = slice(start, min(start + rows, count))
                    queries, own = everyones[process, chunk], places[process, chunk]
                    found = kernel.statistics(queries @ weight.T, own)
                    normaliser, target_score, top = _joined(found)
                    loss = loss + (normaliser - target_score).sum()
                    if process == rank():
                        hits = hits + (target_score >= top).sum()
                    if grad_hidden is not None and grad_shard is not None:
                        slope = kernel.slope(found, normaliser, own).to(hidden.dtype)
                        torch.mm(slope, weight, out=grad_hidden[process, chunk])
                        grad_shard += slope.T @ queries
                        del slope
                    del found  # before the next chunk's scores are made
        ctx.count, ctx.dtypes = max(1, sum(counts)), (hidden.dtype, shard.dtype)
        if grad_hidden is not None and grad_shard is not None:
            ctx.save_for_backward(scatter_sum(grad_hidden)[: len(hidden)], grad_shard)
        ctx.mark_non_differentiable(hits)
        return loss / ctx.count, hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_hits: Tensor) -> tuple[Tensor | None, ...]:
        # The loss is one number that all processes hold: what they send back for it adds up.
        share = sum_over_processes(grad_loss) / ctx.count
        grad_hidden, grad_shard = ctx.saved_tensors
        return (
            (grad_hidden * share).to(ctx.dtypes[0]),
            (grad_shard * (share / world_size())).to(ctx.dtypes[1]),
            *[None] * 5,
        )


def _joined(found: ShardStatistics) -> tuple[Tensor, Tensor, Tensor]:
    """Normaliser, target's score and largest score over all shards, `[M]` each."""
    top, target_score = largest_over_processes(torch.stack([found.top, found.target_score]))
    total = sum_over_processes(found.total * (found.top - top).exp())
    return top + total.log(), target_score, top
