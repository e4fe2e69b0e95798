"""The mean cross entropy over all items in plain torch."""

import functools

import torch
from torch import Tensor

from hpgr_plugin.ops.item_softmax.chunks import mean_in_chunks
from hpgr_plugin.ops.item_softmax.sharded import ShardStatistics, sharded_in_chunks


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


class TorchShardKernel:
    """See `sharded.ShardKernel`; the scores become exponentials in place."""

    def statistics(self, scores: Tensor, targets: Tensor) -> ShardStatistics:
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if not scores.shape[1]:
            lowest = scores.new_full((len(scores),), -torch.inf)
            return ShardStatistics(lowest, torch.zeros_like(lowest), lowest, scores)
        target_score = scores.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
        target_score = target_score.masked_fill(targets < 0, -torch.inf)
        top = scores.amax(1)
        power = scores.sub_(top.unsqueeze(1)).exp_()
        return ShardStatistics(top, power.sum(1), target_score, power)

    def slope(self, found: ShardStatistics, normaliser: Tensor, targets: Tensor) -> Tensor:
        power = found.scores.mul_((found.top - normaliser).exp().unsqueeze(1))
        if power.shape[1]:
            here = torch.where(targets < 0, 0.0, -1.0).to(power.dtype)
            power.scatter_add_(1, targets.clamp(min=0).unsqueeze(1), here.unsqueeze(1))
        return power


mean_cross_entropy = functools.partial(mean_in_chunks, softmax_slope=softmax_slope)
sharded_cross_entropy = functools.partial(sharded_in_chunks, kernel=TorchShardKernel())
