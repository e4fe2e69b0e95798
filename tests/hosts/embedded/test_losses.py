"""The losses inside a request, against loops over its pairs."""

import torch
import torch.nn.functional as F

from hpgr_plugin.hosts.embedded.train.losses import listwise_loss, pairwise_loss


def sample() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Requests of several sizes, one empty, one without a positive, one without a negative."""
    offsets = torch.tensor([0, 5, 5, 7, 9, 16])
    labels = torch.randint(0, 2, (16,)).double()
    labels[:2] = torch.tensor([0.0, 1.0])
    labels[5:7], labels[7:9] = 0.0, 1.0
    return torch.randn(16, dtype=torch.float64, requires_grad=True), labels, offsets


def by_loops(logits: torch.Tensor, labels: torch.Tensor, offsets: torch.Tensor, form: str):
    total = logits.new_zeros(())
    for start, end in offsets.unfold(0, 2, 1).tolist():
        scores, wanted = logits[start:end], labels[start:end] == 1
        good, bad = scores[wanted], scores[~wanted]
        if not len(good) or not len(bad):
            continue
        if form == "pairwise":
            losses = [F.softplus(n - p) for p in good for n in bad]
        else:
            losses = [-F.log_softmax(torch.cat([p[None], bad]), 0)[0] for p in good]
        total = total + torch.stack(losses).mean() * (end - start)
    return total


def test_the_losses_and_gradients_are_those_of_loops() -> None:
    for form, loss in (("pairwise", pairwise_loss), ("listwise", listwise_loss)):
        logits, labels, offsets = sample()
        found, expected = loss(logits, labels, offsets), by_loops(logits, labels, offsets, form)
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(value, logits)[0] for value in (found, expected)]
        torch.testing.assert_close(*gradients)


def test_nothing_to_compare_is_zero() -> None:
    logits = torch.randn(3, requires_grad=True)
    for loss in (pairwise_loss, listwise_loss):
        for labels in (torch.zeros(3), torch.ones(3)):
            value = loss(logits, labels, torch.tensor([0, 1, 3]))
            assert value == 0
            assert torch.autograd.grad(value, logits)[0].abs().sum() == 0
        assert loss(logits[:0], torch.zeros(0), torch.tensor([0])) == 0
