"""Alignment losses by hand, and the three kinds of worse slates."""

import math

import pytest
import torch

from hpgr_plugin.components.slates.alignment import (
    SlateLogProbs,
    by_feedback,
    dpo_loss,
    nearest_items,
    orpo_loss,
    other_order,
    replaced,
    simpo_loss,
    too_similar,
)
from hpgr_plugin.errors import HpgrError

SLATES = torch.tensor([[4, 7, 1, 9], [0, 2, 3, 5]])


def slate(*probabilities: float, counted: tuple[bool, ...] | None = None) -> SlateLogProbs:
    digits = torch.tensor(probabilities, dtype=torch.float64).log().view(1, 1, -1)
    mask = torch.ones_like(digits) if counted is None else torch.tensor(counted).view(1, 1, -1)
    return SlateLogProbs(digits, mask.bool())


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_losses_by_hand() -> None:
    better, worse = slate(0.8, 0.5), slate(0.3, 0.4)
    gap = logit(0.8) + logit(0.5) - logit(0.3) - logit(0.4)
    wanted = -math.log(0.4) + 0.1 * math.log1p(math.exp(-gap))
    assert float(orpo_loss(better, worse, alpha=0.1)) == pytest.approx(wanted)
    reference = (torch.tensor([-1.0]), torch.tensor([-2.0]))
    gain = (math.log(0.4) + 1.0) - (math.log(0.12) + 2.0)
    wanted = math.log1p(math.exp(-0.5 * gain))
    assert float(dpo_loss(better, worse, reference, beta=0.5)) == pytest.approx(wanted, rel=1e-6)
    gain = (math.log(0.4) - math.log(0.12)) / 2
    wanted = math.log1p(math.exp(-(2.0 * gain - 0.3)))
    assert float(simpo_loss(better, worse, beta=2.0, margin=0.3)) == pytest.approx(wanted)


def test_a_digit_without_a_choice_does_not_count() -> None:
    """Its probability is one, whose odds are infinite."""
    better, worse = slate(0.8, 1.0, counted=(True, False)), slate(0.3, 1.0, counted=(True, False))
    loss = orpo_loss(better, worse, alpha=0.1)
    assert torch.equal(loss, orpo_loss(slate(0.8), slate(0.3), alpha=0.1))


def test_the_gradient_is_finite_for_a_certain_digit() -> None:
    log_p = torch.tensor([[[0.0, -0.5]]], requires_grad=True)
    one = SlateLogProbs(log_p, torch.ones_like(log_p).bool())
    orpo_loss(one, slate(0.3, 0.4), alpha=0.1).sum().backward()
    assert torch.isfinite(log_p.grad).all()


def test_liked_items_come_first_in_their_order() -> None:
    labels = torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert by_feedback(SLATES, labels).tolist() == [[7, 9, 4, 1], [0, 2, 3, 5]]


def test_another_order_holds_the_same_items() -> None:
    rng = torch.Generator().manual_seed(0)
    moved = other_order(SLATES.repeat(20, 1), torch.tensor([4, 2]).repeat(20), rng)
    assert torch.equal(moved.sort(1).values, SLATES.repeat(20, 1).sort(1).values)
    assert torch.equal(moved[1::2, 2:], SLATES[1:, 2:].expand(20, -1))
    assert (moved != SLATES.repeat(20, 1)).any()


def test_replacements_are_disliked_and_not_of_the_slate() -> None:
    disliked = torch.zeros(2, 12, dtype=torch.bool)
    disliked[0, [0, 2, 3, 5, 6, 4]] = True
    disliked[1, [7]] = True
    worse = replaced(SLATES, disliked, torch.Generator().manual_seed(0))
    assert set(worse[0].tolist()) <= {0, 2, 3, 5, 6}
    assert 7 in worse[1].tolist()
    assert not set(worse[1].tolist()) & {0, 2, 3, 5}
    assert all(len(set(row)) == 4 for row in worse.tolist())


def test_items_that_the_user_took_are_not_put_into_a_worse_slate() -> None:
    """Unless no others are left."""
    near = torch.tensor([[3, 1, 2, 4]] * 5)
    taken = torch.tensor([[True, True, False, True, False], [True] * 5])
    worse = too_similar(torch.tensor([[0, 1, 3], [0, 1, 3]]), near, taken)
    assert worse.tolist() == [[0, 2, 4], [0, 3, 1]]
    never, disliked = torch.zeros(2, 12, dtype=torch.bool), torch.zeros(2, 12, dtype=torch.bool)
    never[0, [0, 2, 3]] = True
    never[1, 6:] = True
    found = replaced(SLATES, disliked, torch.Generator().manual_seed(0), never=never)
    assert not set(found[0].tolist()) & {0, 2, 3, 4, 7, 1, 9}
    assert {1, 4} < set(found[1].tolist())  # all that are left, then those of `never`
    assert not set(found[1].tolist()) & {0, 2, 3, 5}


def test_too_similar_items_are_the_neighbours_of_the_first() -> None:
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.2], [0.0, 1.0], [-1.0, 0.0], [1.0, 0.1]])
    near = nearest_items(vectors, 2)
    assert near[0].tolist() == [4, 1]
    assert too_similar(torch.tensor([[0, 2, 3]]), near).tolist() == [[0, 4, 1]]
    assert nearest_items(vectors, 1, farthest=True)[0].tolist() == [3]
    with pytest.raises(HpgrError, match="5 neighbours need more items than 5"):
        nearest_items(vectors, 5)
