"""The mean cross entropy over all items, one kernel for softmax and slope."""

import functools

import torch
import triton
from torch import Tensor

from hpgr_plugin.ops.dispatch import product_dtype
from hpgr_plugin.ops.item_softmax.chunks import mean_in_chunks
from hpgr_plugin.ops.item_softmax.kernels import (
    shard_slope_kernel,
    shard_statistics_kernel,
    softmax_slope_kernel,
)
from hpgr_plugin.ops.item_softmax.losses import SoftmaxInputs
from hpgr_plugin.ops.item_softmax.sharded import (
    ShardInputs,
    ShardStatistics,
    sharded_in_chunks,
)

_BLOCK = 16384  # logits of a row at a time
_LANE = 8  # neighbours that one thread holds and reduces by itself


def why_not(inputs: SoftmaxInputs | ShardInputs) -> str | None:
    """Why the kernel does not support the case, or None."""
    dtype = product_dtype(inputs.hidden)
    known = dtype in (torch.float32, torch.bfloat16, torch.float16)
    return None if known else f"dtype {dtype}"


def softmax_slope(
    scores: Tensor, targets: Tensor, bias: Tensor | None, *, with_slope: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `chunks.SoftmaxSlope`; rows of the scores are contiguous.

    Losses are float32. The scores are overwritten, in their own dtype, only with `with_slope`.
    """
    num_rows, size = scores.shape
    losses = torch.empty(num_rows, dtype=torch.float32, device=scores.device)
    hits = torch.empty(num_rows, dtype=torch.bool, device=scores.device)
    if num_rows:
        block = _block(size)
        softmax_slope_kernel[(num_rows,)](
            scores, targets, scores if bias is None else bias, losses, hits, size,
            scores.stride(0), BIAS=bias is not None, SLOPE=with_slope, BLOCK=block,
            LANE=_LANE, num_warps=_warps(block),
        )  # fmt: skip
    return losses, hits, scores


class TritonShardKernel:
    """See `sharded.ShardKernel`; the slope overwrites the scores in their own dtype."""

    def statistics(self, scores: Tensor, targets: Tensor) -> ShardStatistics:
        num_rows, size = scores.shape
        top, total, target_score = scores.new_empty((3, num_rows), dtype=torch.float32)
        if not size:
            lowest = top.fill_(-torch.inf)
            return ShardStatistics(lowest, total.zero_(), lowest, scores)
        if num_rows:
            block = _block(size)
            shard_statistics_kernel[(num_rows,)](
                scores, targets, top, total, target_score, size, scores.stride(0),
                BLOCK=block, LANE=_LANE, num_warps=_warps(block),
            )  # fmt: skip
        return ShardStatistics(top, total, target_score, scores)

    def slope(self, found: ShardStatistics, normaliser: Tensor, targets: Tensor) -> Tensor:
        scores = found.scores
        if scores.numel():
            block = _block(scores.shape[1])
            shard_slope_kernel[(len(scores),)](
                scores, targets, normaliser, scores.shape[1], scores.stride(0),
                BLOCK=block, num_warps=_warps(block),
            )  # fmt: skip
        return scores


def _block(size: int) -> int:
    return max(_LANE, min(_BLOCK, triton.next_power_of_2(size)))


def _warps(block: int) -> int:
    return min(32, max(1, block // 512))


mean_cross_entropy = functools.partial(mean_in_chunks, softmax_slope=softmax_slope)
sharded_cross_entropy = functools.partial(sharded_in_chunks, kernel=TritonShardKernel())
