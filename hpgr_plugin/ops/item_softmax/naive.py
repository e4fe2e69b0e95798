"""The mean cross entropy over all items as a loop over positions: the reference."""

import torch

from hpgr_plugin.ops.item_softmax.losses import MeanLoss, SoftmaxInputs, total_weight


def why_not_sharded_cross_entropy(*_: object) -> str:
    """The reference of the sharded loss is `mean_cross_entropy` over the whole table."""
    return "it has no form for shards"


def mean_cross_entropy(inputs: SoftmaxInputs) -> MeanLoss:
    """`-log(exp(s_target) / sum_j exp(s_j))`, averaged over positions; in one chunk."""
    hidden, item_table, targets, bias, _, weights = inputs
    if weights is None:
        weights = hidden.new_ones(len(hidden))
    # Times zero: without positions the loss is 0 and so are the gradients.
    loss, hits = hidden.sum() * 0.0 + item_table.sum() * 0.0, targets.new_zeros(())
    for row, target, weight in zip(hidden, targets.tolist(), weights, strict=True):
        scores = torch.stack([row @ item for item in item_table])
        if bias is not None:
            scores = scores + bias
        powers = (scores - scores.max()).exp()
        loss = loss - weight * (powers[target] / powers.sum()).log()
        hits = hits + bool(scores[target] >= scores.max())
    return MeanLoss(loss / total_weight(len(hidden), inputs.weights), hits)
