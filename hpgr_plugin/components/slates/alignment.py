"""Listwise preference alignment: an engaged slate y+ against a worse one y-.

    z(y) = sum_t log[pi_t / (1 - pi_t)] over the digits of y that leave a choice
    ORPO:    -log pi(y+) - alpha log sigma(z(y+) - z(y-))
    DPO:     -log sigma(beta [log pi(y+)/ref(y+) - log pi(y-)/ref(y-)])
    SimPO:   -log sigma(beta [log pi(y+) - log pi(y-)] / T - margin), T digits

y- is one of three, drawn for each user: y+ in another order, y+ with its items replaced by ones
that the user did not like, or its first item and then items too similar to it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hpgr_plugin.errors import HpgrError

Objective = Literal["order", "interest", "diversity"]
OBJECTIVES: tuple[Objective, ...] = ("order", "interest", "diversity")
_LARGEST_LOG_PROB = -1e-6  # keeps log(1 - pi) finite


class SlateLogProbs(NamedTuple):
    """A decoder's log-probabilities of one slate per user.

    Attributes:
        digits: `[B, M, L]`.
        counted: bool `[B, M, L]`, digits that leave a choice, of slots that are in use.
    """

    digits: Tensor
    counted: Tensor

    def total(self) -> Tensor:
        """log pi(y), `[B]`."""
        return torch.where(self.counted, self.digits, 0.0).sum((1, 2))

    def log_odds(self) -> Tensor:
        """z(y), `[B]`."""
        log_p = self.digits.clamp(max=_LARGEST_LOG_PROB)
        odds = log_p - torch.log(-torch.expm1(log_p))
        return torch.where(self.counted, odds, 0.0).sum((1, 2))

    def length(self) -> Tensor:
        """T, `[B]`."""
        return self.counted.sum((1, 2)).clamp(min=1)


def orpo_loss(better: SlateLogProbs, worse: SlateLogProbs, *, alpha: float) -> Tensor:
    """The ORPO form, `[B]`."""
    return -better.total() - alpha * F.logsigmoid(better.log_odds() - worse.log_odds())


def dpo_loss(
    better: SlateLogProbs,
    worse: SlateLogProbs,
    reference: tuple[Tensor, Tensor],
    *,
    beta: float,
) -> Tensor:
    """DPO, `[B]`; the reference's log-probabilities of both slates are `[B]`."""
    gain = (better.total() - reference[0]) - (worse.total() - reference[1])
    return -F.logsigmoid(beta * gain)


def simpo_loss(
    better: SlateLogProbs, worse: SlateLogProbs, *, beta: float, margin: float
) -> Tensor:
    """SimPO, `[B]`."""
    gain = better.total() / better.length() - worse.total() / worse.length()
    return -F.logsigmoid(beta * gain - margin)


def by_feedback(slates: Tensor, labels: Tensor) -> Tensor:
    """Slates `[B, M]` with the liked items first, otherwise in their order."""
    return slates.gather(1, labels.argsort(dim=1, descending=True, stable=True))


def other_order(slates: Tensor, lengths: Tensor, generator: torch.Generator) -> Tensor:
    """A random order of the items of each slate; slots beyond its length stay.

    Args:
        slates: int64 `[B, M]`.
        lengths: `[B]`.
        generator: on the CPU.
    """
    slot = torch.arange(slates.shape[1], device=slates.device)
    drawn = torch.rand(slates.shape, generator=generator).to(slates.device)
    key = torch.where(slot < lengths.unsqueeze(1), drawn, 1.0 + slot)
    return slates.gather(1, key.argsort(1))


def replaced(
    slates: Tensor, disliked: Tensor, generator: torch.Generator, *, never: Tensor | None = None
) -> Tensor:
    """Every item replaced by one of the user's disliked ones, or by any where they run out.

    Args:
        slates: int64 `[B, M]`.
        disliked: bool `[B, V]`.
        generator: on the CPU.
        never: bool `[B, V]`, items that replace nothing while others are left.
    """
    size, num_items = disliked.shape
    score = torch.rand(size, num_items, generator=generator).to(slates.device)
    score = score + disliked.to(score.dtype)
    if never is not None:
        score = score - 2.0 * never.to(score.dtype)
    score.scatter_(1, slates, -3.0)  # not the items of the slate itself
    return score.topk(slates.shape[1], dim=1).indices


def too_similar(slates: Tensor, neighbours: Tensor, never: Tensor | None = None) -> Tensor:
    """The first item of each slate, then those nearest to it.

    Args:
        slates: int64 `[B, M]`.
        neighbours: int64 `[V, N]`, of every item, nearest first; N at least M - 1.
        never: bool `[B, V]`, items that are passed over while other neighbours are left.
    """
    first = slates[:, :1]
    near = neighbours[first.squeeze(1)]
    if never is not None:
        near = near.gather(1, never.gather(1, near).to(torch.uint8).argsort(dim=1, stable=True))
    return torch.cat([first, near[:, : slates.shape[1] - 1]], dim=1)


def nearest_items(vectors: Tensor, count: int, *, farthest: bool = False) -> Tensor:
    """The `count` items nearest each by cosine, or the farthest: int64 `[V, count]`.

    Raises:
        HpgrError: there are not so many others.
    """
    if count >= len(vectors):
        raise HpgrError(f"{count} neighbours need more items than {len(vectors)}")
    units, found = F.normalize(vectors, dim=1), []
    for start in range(0, len(units), 2048):
        part = units[start : start + 2048] @ units.T
        own = torch.arange(len(part), device=part.device)
        part[own, own + start] = torch.inf if farthest else -torch.inf
        found.append(part.topk(count, dim=1, largest=not farthest).indices)
    return torch.cat(found)
