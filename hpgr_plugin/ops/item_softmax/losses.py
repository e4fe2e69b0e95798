"""What the losses over items return, and the sampled softmax."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_SMALLEST_WEIGHT = 1e-12  # of all positions together: without any, the mean is 0


class SoftmaxInputs(NamedTuple):
    """The arguments of `mean_cross_entropy`."""

    hidden: Tensor
    item_table: Tensor
    targets: Tensor
    bias: Tensor | None
    chunk_bytes: int | None
    weights: Tensor | None = None


class ItemLosses(NamedTuple):
    """Per scored position: `losses` `[M]`, and `hits` `[M]` bool, no item scored higher."""

    losses: Tensor
    hits: Tensor


def total_weight(count: int, weights: Tensor | None) -> Tensor | int:
    """What a weighted sum of losses is divided by; never zero."""
    return max(1, count) if weights is None else weights.sum().clamp(min=_SMALLEST_WEIGHT)


class MeanLoss(NamedTuple):
    """Over all scored positions: mean `loss`, and `hits`, how many had no item scored higher."""

    loss: Tensor
    hits: Tensor


def sampled_cross_entropy(
    hidden: Tensor,
    item_table: Tensor,
    targets: Tensor,
    negatives: Tensor,
    log_proposal: Tensor,
    bias: Tensor | None = None,
) -> ItemLosses:
    """Softmax cross entropy with the normaliser estimated from shared negatives.

    With K negatives drawn from Q, `Z = exp(s_target) + sum_{j != target} exp(s_j) / (K Q_j)` is
    unbiased: hence each negative's score minus `log(K Q_j)`, the log-Q correction. A negative that
    is the position's own target does not count.

    Args:
        hidden: `[M, D]`.
        item_table: `[V, D]`.
        targets: int64 `[M]`.
        negatives: int64 `[K]`, drawn from Q with replacement.
        log_proposal: `[V]`, log Q.
        bias: `[V]`.

    Returns:
        A loss per position; hits are counted among the target and the negatives.
    """
    return sampled_cross_entropy_of_rows(
        hidden,
        F.embedding(targets, item_table),
        F.embedding(negatives, item_table),
        targets,
        negatives,
        log_proposal[negatives],
        None if bias is None else (bias[targets], bias[negatives]),
    )


def sampled_cross_entropy_of_rows(
    hidden: Tensor,
    target_rows: Tensor,
    negative_rows: Tensor,
    targets: Tensor,
    negatives: Tensor,
    log_proposal: Tensor,
    biases: tuple[Tensor, Tensor] | None = None,
) -> ItemLosses:
    """`sampled_cross_entropy` from rows that are looked up already.

    Args:
        hidden: `[M, D]`.
        target_rows: `[M, D]`.
        negative_rows: `[K, D]`.
        targets: int64 `[M]`.
        negatives: int64 `[K]`.
        log_proposal: log Q of the negatives, `[K]`.
        biases: of the targets, `[M]`, and of the negatives, `[K]`.
    """
    exact = torch.promote_types(hidden.dtype, torch.float32)
    target_scores = (hidden * target_rows).to(exact).sum(1)
    scores = F.linear(hidden, negative_rows).to(exact)
    if biases is not None:
        target_scores = target_scores + biases[0]
        scores = scores + biases[1]
    correction = log_proposal + math.log(len(negatives))
    same = negatives == targets.unsqueeze(1)
    corrected = (scores - correction.to(exact)).masked_fill(same, -torch.inf)
    normaliser = torch.cat([target_scores.unsqueeze(1), corrected], 1).logsumexp(1)
    return ItemLosses(normaliser - target_scores, (scores <= target_scores.unsqueeze(1)).all(1))
