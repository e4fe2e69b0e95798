"""The mean cross entropy over all items, one kernel for softmax and slope."""

import functools

import torch
import triton
from torch import Tensor

from hpgr_plugin.ops.item_softmax.chunks import mean_in_chunks, product_dtype
from hpgr_plugin.ops.item_softmax.kernels import softmax_slope_kernel
from hpgr_plugin.ops.item_softmax.losses import SoftmaxInputs

_BLOCK = 16384  # logits of a row at a time
_LANE = 8  # neighbours that one thread holds and reduces by itself


def why_not(inputs: SoftmaxInputs) -> str | None:
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
        block = max(_LANE, min(_BLOCK, triton.next_power_of_2(size)))
        softmax_slope_kernel[(num_rows,)](
            scores, targets, scores if bias is None else bias, losses, hits, size,
            scores.stride(0), BIAS=bias is not None, SLOPE=with_slope, BLOCK=block,
            LANE=_LANE, num_warps=min(32, max(1, block // 512)),
        )  # fmt: skip
    return losses, hits, scores


mean_cross_entropy = functools.partial(mean_in_chunks, softmax_slope=softmax_slope)
