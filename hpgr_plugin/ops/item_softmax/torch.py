"""The mean cross entropy over all items in plain torch."""

import torch
from torch import Tensor

from hpgr_plugin.ops.item_softmax.chunks import mean_in_chunks
from hpgr_plugin.ops.item_softmax.losses import MeanLoss, SoftmaxInputs


def mean_cross_entropy(inputs: SoftmaxInputs) -> MeanLoss:
    """See `hpgr_plugin.ops.item_softmax.mean_cross_entropy`."""
    return mean_in_chunks(inputs, softmax_slope)


def softmax_slope(
    scores: Tensor, targets: Tensor, bias: Tensor | None, *, with_slope: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `chunks.SoftmaxSlope`; float32 scores are overwritten."""
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
