"""The softmax in chunks against the full one, and the sampled one in expectation."""

import pytest
import torch
import torch.nn.functional as F

from hpgr_plugin.ops.item_softmax import mean_cross_entropy, sampled_cross_entropy


def problem(M=7, V=23, D=5, dtype=torch.float64, with_bias=True):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(M, D, generator=g, dtype=dtype, requires_grad=True)
    table = torch.randn(V, D, generator=g, dtype=dtype, requires_grad=True)
    bias = torch.randn(V, generator=g, dtype=dtype, requires_grad=True) if with_bias else None
    targets = torch.randint(0, V, (M,), generator=g)
    return hidden, table, targets, bias


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows_at_once", [0, 1, 3, 6, 7, 100])
def test_the_mean_in_chunks_is_the_full_one(rows_at_once, with_bias):
    hidden, table, targets, bias = problem(with_bias=with_bias)
    inputs = [x for x in (hidden, table, bias) if x is not None]
    got = mean_cross_entropy(hidden, table, targets, bias, chunk_bytes=rows_at_once * 23 * 8)
    scores = F.linear(hidden, table, bias)
    want = F.cross_entropy(scores, targets)
    torch.testing.assert_close(got.loss, want, rtol=0, atol=1e-12)
    assert got.hits == (scores.argmax(1) == targets).sum()
    for a, b in zip(
        torch.autograd.grad(3 * got.loss, inputs),
        torch.autograd.grad(3 * want, inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "naive"])
@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
def test_the_mean_takes_weights(rows_at_once, backend):
    hidden, table, targets, bias = problem()
    weights = torch.tensor([0.0, 1.0, 2.5, 0.5, 0.0, 3.0, 1.0], dtype=torch.float64)
    got = mean_cross_entropy(
        hidden, table, targets, bias, weights, chunk_bytes=rows_at_once * 23 * 8, backend=backend
    )
    losses = F.cross_entropy(F.linear(hidden, table, bias), targets, reduction="none")
    want = (losses * weights).sum() / weights.sum()
    torch.testing.assert_close(got.loss, want, rtol=0, atol=1e-12)
    inputs = (hidden, table, bias)
    for a, b in zip(
        torch.autograd.grad(3 * got.loss, inputs),
        torch.autograd.grad(3 * want, inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    nothing = mean_cross_entropy(hidden, table, targets, bias, 0 * weights, backend=backend)
    assert nothing.loss == 0


def test_the_mean_with_scores_far_apart():
    hidden, table, targets, bias = problem()
    got = mean_cross_entropy(1e3 * hidden, table, targets, bias, chunk_bytes=4 * 23 * 8)
    want = F.cross_entropy(F.linear(1e3 * hidden, table, bias), targets)
    torch.testing.assert_close(got.loss, want)


def test_the_mean_without_gradients_and_of_some():
    hidden, table, targets, bias = problem()
    wanted = torch.autograd.grad(mean_cross_entropy(hidden, table, targets, bias).loss, hidden)
    table, bias = table.detach(), bias.detach()
    loss = mean_cross_entropy(hidden, table, targets, bias).loss
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], wanted[0])
    with torch.no_grad():
        assert torch.equal(mean_cross_entropy(hidden, table, targets, bias).loss, loss)


def test_the_mean_with_nothing_to_score():
    hidden, table, targets, bias = problem(M=0)
    loss = mean_cross_entropy(hidden, table, targets, bias).loss
    loss.backward()
    assert loss == 0
    assert torch.equal(table.grad, torch.zeros_like(table))


def test_the_mean_under_autocast():
    hidden, table, targets, bias = problem(M=64, V=300, D=16, dtype=torch.float32)
    want = mean_cross_entropy(hidden, table, targets, bias).loss
    want_grads = torch.autograd.grad(want, (hidden, table))
    with torch.autocast("cpu", torch.bfloat16):
        got = mean_cross_entropy(hidden, table, targets, bias, chunk_bytes=40 * 300 * 2).loss
        grads = torch.autograd.grad(got, (hidden, table))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=5e-3, atol=0)
    for a, b in zip(grads, want_grads, strict=True):
        assert a.dtype == torch.float32
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
