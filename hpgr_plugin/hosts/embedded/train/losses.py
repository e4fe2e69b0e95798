"""Losses that compare the candidates of one request: what a user likes more, not who likes much.

Each is a mean inside a request, times the request's candidates, as GAUC weighs users. A request
without both labels has nothing to compare and gives zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hpgr_plugin.ops.jagged import jagged_to_padded_dense


def pairwise_loss(
    logits: Tensor, labels: Tensor, offsets: Tensor, longest: int | None = None
) -> Tensor:
    """Sum over requests of the mean of `log(1 + exp(s_negative - s_positive))` over its pairs.

    Args:
        logits: `[C]`.
        labels: `[C]`, 0 or 1.
        offsets: `[B + 1]` into the candidates.
        longest: the most candidates of a request; None: the device is asked for it.
    """
    scores, positive, negative = _padded(logits, labels, offsets, longest)
    margins = scores.unsqueeze(2) - scores.unsqueeze(1)
    pairs = positive.unsqueeze(2) * negative.unsqueeze(1)
    return _weighed(F.softplus(-margins) * pairs, pairs, offsets)


def listwise_loss(
    logits: Tensor, labels: Tensor, offsets: Tensor, longest: int | None = None
) -> Tensor:
    """Sum over requests of the mean of `-log softmax(s)` over its positives; arguments as above.

    A positive competes with the negatives only, so two positives do not push each other down.
    """
    scores, positive, negative = _padded(logits, labels, offsets, longest)
    rivals = torch.where(negative > 0, scores, -torch.inf).logsumexp(1, keepdim=True)
    has_both = (negative.sum(1, keepdim=True) > 0) * positive
    # Without a negative the sum over none is -inf, whose gradient would not be finite.
    margins = torch.where(has_both > 0, torch.where(has_both > 0, rivals, 0.0) - scores, 0.0)
    return _weighed(F.softplus(margins) * has_both, has_both, offsets)


def _padded(
    logits: Tensor, labels: Tensor, offsets: Tensor, longest: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, positives and negatives, `[B, N]` each; padding is neither."""
    if longest is None:
        longest = int(offsets.diff().max()) if len(offsets) > 1 else 0
    columns = torch.stack([logits, labels, 1 - labels], dim=1)
    scores, positive, negative = jagged_to_padded_dense(columns, offsets, longest).unbind(2)
    return scores, positive, negative


def _weighed(losses: Tensor, counted: Tensor, offsets: Tensor) -> Tensor:
    """The sum over requests of the mean loss, times the number of candidates."""
    total, count = losses.flatten(1).sum(1), counted.flatten(1).sum(1)
    return (total / count.clamp(min=1) * offsets.diff()).sum()
