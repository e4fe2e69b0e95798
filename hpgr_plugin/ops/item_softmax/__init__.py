"""Softmax cross entropy over all items in little memory, and its sampled form (Eq. 3)."""

from torch import Tensor

from hpgr_plugin.ops.dispatch import triton_operator
from hpgr_plugin.ops.item_softmax.losses import (
    ItemLosses,
    MeanLoss,
    SoftmaxInputs,
    sampled_cross_entropy,
    sampled_cross_entropy_of_rows,
    total_weight,
)
from hpgr_plugin.ops.item_softmax.sharded import ShardInputs

__all__ = [
    "ItemLosses",
    "MeanLoss",
    "mean_cross_entropy",
    "sampled_cross_entropy",
    "sampled_cross_entropy_of_rows",
    "sharded_cross_entropy",
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


def sharded_cross_entropy(
    hidden: Tensor,
    shard: Tensor,
    targets: Tensor,
    *,
    first_row: int,
    num_items: int,
    chunk_bytes: int | None = None,
    backend: str | None = None,
) -> MeanLoss:
    """The mean cross entropy over an item table whose rows are divided among the processes.

    Every process calls it with its own positions and its own rows. The gradient of `shard` is that
    of its own rows only. As DDP does, it is the mean over processes of what each sends back, so
    that table and dense weights may share an optimizer.

    Args:
        hidden: `[M, D]`, of this process; M may be 0 and differ between processes.
        shard: `[V_r, D]`, rows `first_row` to `first_row + V_r - 1` of the table.
        targets: int64 `[M]`, in `[0, V)`.
        first_row: of the shard.
        num_items: V; no shard has more than `ceil(V / W)` rows, W the number of processes.
        chunk_bytes: bound of the memory for logits, at least those of one position are held.
        backend: "triton" or "torch"; None: the fastest that can.

    Returns:
        The mean loss over the positions of all processes, the same number on each, and how many of
        this process's positions had no item that scored higher than the target.
    """
    inputs = ShardInputs(hidden, shard, targets, first_row, num_items, chunk_bytes)
    loss: MeanLoss = _OPERATOR.run("sharded_cross_entropy", inputs, backend=backend)
    return loss
