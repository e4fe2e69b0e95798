"""The mean cross entropy over all items as a loop over positions: the reference."""

import torch

from hpgr_plugin.ops.item_softmax.losses import MeanLoss, SoftmaxInputs


def why_not_sharded_cross_entropy(*_: object) -> str:
    """The reference of the sharded loss is `mean_cross_entropy` over the whole table."""
    return "it has no form for shards"


def mean_cross_entropy(inputs: SoftmaxInputs) -> MeanLoss:
    """`-log(exp(s_target) / sum_j exp(s_j))`, averaged over positions; in one chunk."""
    hidden, item_table, targets, bias, _ = inputs
    # Times zero: without positions the loss is 0 and so are the gradients.
    loss, hits = hidden.sum() * 0.0 + item_table.sum() * 0.0, targets.new_zeros(())
    for row, target in zip(hidden, targets.tolist(), strict=True):
        scores = torch.stack([row @ item for item in item_table])
        if bias is not None:
            scores = scores + bias
        powers = (scores - scores.max()).exp()
        loss = loss - (powers[target] / powers.sum()).log()
        hits = hits + bool(scores[target] >= scores.max())
    return MeanLoss(loss / max(1, len(hidden)), hits)
