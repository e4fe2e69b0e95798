"""The chunked softmax against the full one, and the sampled one in expectation."""

import pytest
import torch
import torch.nn.functional as F

from hpgr_plugin.losses import chunked_cross_entropy, sampled_cross_entropy


def problem(M=7, V=23, D=5, dtype=torch.float64, with_bias=True):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(M, D, generator=g, dtype=dtype, requires_grad=True)
    table = torch.randn(V, D, generator=g, dtype=dtype, requires_grad=True)
    bias = torch.randn(V, generator=g, dtype=dtype, requires_grad=True) if with_bias else None
    targets = torch.randint(0, V, (M,), generator=g)
    return hidden, table, targets, bias


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("chunk_elements", [1, 7, 7 * 5, 7 * 22, 7 * 23, 10**6])
def test_chunked_equals_full(chunk_elements, with_bias):
    hidden, table, targets, bias = problem(with_bias=with_bias)
    inputs = [x for x in (hidden, table, bias) if x is not None]
    weights = torch.randn(7, dtype=torch.float64)
    got = chunked_cross_entropy(hidden, table, targets, bias, chunk_elements=chunk_elements)
    scores = F.linear(hidden, table, bias)
    want = F.cross_entropy(scores, targets, reduction="none")
    torch.testing.assert_close(got.losses, want, rtol=0, atol=1e-12)
    assert torch.equal(got.hits, scores.argmax(1) == targets)
    for a, b in zip(
        torch.autograd.grad((got.losses * weights).sum(), inputs),
        torch.autograd.grad((want * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_chunked_with_scores_far_apart():
    hidden, table, targets, bias = problem()
    got = chunked_cross_entropy(1e3 * hidden, table, targets, bias, chunk_elements=7 * 4)
    want = F.cross_entropy(F.linear(1e3 * hidden, table, bias), targets, reduction="none")
    torch.testing.assert_close(got.losses, want)


def test_chunked_with_nothing_to_score():
    hidden, table, targets, bias = problem(M=0)
    losses = chunked_cross_entropy(hidden, table, targets, bias).losses
    losses.sum().backward()
    assert losses.shape == (0,)
    assert torch.equal(table.grad, torch.zeros_like(table))


def test_chunked_under_autocast():
    hidden, table, targets, bias = problem(M=64, V=300, D=16, dtype=torch.float32)
    want = chunked_cross_entropy(hidden, table, targets, bias).losses
    want_grads = torch.autograd.grad(want.mean(), (hidden, table))
    with torch.autocast("cpu", torch.bfloat16):
        got = chunked_cross_entropy(hidden, table, targets, bias, chunk_elements=64 * 40).losses
        grads = torch.autograd.grad(got.mean(), (hidden, table))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.mean(), want.mean(), rtol=5e-3, atol=0)
    for a, b in zip(grads, want_grads, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("skewed", [False, True])
def test_sampled_is_the_full_one_in_expectation(skewed):
    hidden, table, targets, bias = problem(V=12)
    proposal = torch.ones(12, dtype=torch.float64)
    if skewed:
        proposal[:3] = 20.0
    proposal /= proposal.sum()
    g = torch.Generator().manual_seed(0)
    negatives = proposal.multinomial(200_000, replacement=True, generator=g)
    got = sampled_cross_entropy(hidden, table, targets, negatives, proposal.log(), bias)
    want = F.cross_entropy(F.linear(hidden, table, bias), targets, reduction="none")
    torch.testing.assert_close(got.losses, want, rtol=0.02, atol=0.02)
    got_grads = torch.autograd.grad(got.losses.sum(), (hidden, table, bias))
    want_grads = torch.autograd.grad(want.sum(), (hidden, table, bias))
    for a, b in zip(got_grads, want_grads, strict=True):
        assert (a - b).norm() < 0.03 * b.norm()


def test_sampled_normaliser_is_unbiased_at_few_negatives():
    hidden, table, targets, bias = (x.detach() for x in problem(M=1, V=6))
    proposal = torch.tensor([0.4, 0.1, 0.1, 0.2, 0.1, 0.1], dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    estimates = []
    scores = F.linear(hidden, table, bias)
    for _ in range(4000):
        negatives = proposal.multinomial(3, replacement=True, generator=g)
        loss = sampled_cross_entropy(hidden, table, targets, negatives, proposal.log(), bias).losses
        estimates.append((loss + scores[0, targets]).exp())
    want = scores.exp().sum()
    assert abs(torch.cat(estimates).mean() - want) < 0.05 * want


def test_a_negative_that_is_the_target_does_not_count():
    hidden, table, _, bias = problem(M=1)
    targets = torch.tensor([4])
    losses = sampled_cross_entropy(
        hidden, table, targets, torch.tensor([4, 4]), torch.zeros(23, dtype=torch.float64), bias
    ).losses
    assert losses.item() == 0.0
