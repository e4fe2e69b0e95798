"""Softmax cross entropy over all items in little memory, and its sampled form (Eq. 3)."""

from torch import Tensor

from hpgr_plugin.ops.dispatch import triton_operator
from hpgr_plugin.ops.item_softmax.losses import (
    ItemLosses,
    MeanLoss,
    SoftmaxInputs,
    sampled_cross_entropy,
    total_weight,
)

__all__ = [
    "ItemLosses",
    "MeanLoss",
    "mean_cross_entropy",
    "sampled_cross_entropy",
    "total_weight",
]

_OPERATOR = triton_operator(__name__)


def mean_cross_entropy(
    hidden: Tensor,
    item_table: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    chunk_bytes: int | None = None,
    backend: str | None = None,
) -> MeanLoss:
    """Mean of `-log softmax(hidden @ item_table.T + bias)[target]` without the `[M, V]` logits.

    It runs over chunks of positions. The logits of a chunk become their own gradient in place while
    they are there, so a training step costs three matrix products, and a call without gradients
    one. Products are taken in the autocast dtype where autocast is on, exponentials and sums in
    float32 at least. The gradients, `[M, D]` and `[V, D]`, are kept for the backward.

    Args:
        hidden: `[M, D]`; without positions the loss is 0.
        item_table: `[V, D]`.
        targets: int64 `[M]`, in `[0, V)`.
        bias: `[V]`.
        weights: `[M]` of the positions in the mean, 0 or more, without gradient; None: all alike.
        chunk_bytes: bound of the memory for logits, at least those of one position are held.
        backend: "triton", "torch" or "naive"; None: the fastest that can.

    Returns:
        The mean loss, and how many positions had no item that scored higher than the target.
    """
    inputs = SoftmaxInputs(hidden, item_table, targets, bias, chunk_bytes, weights)
    loss: MeanLoss = _OPERATOR.run("mean_cross_entropy", inputs, backend=backend)
    return loss
