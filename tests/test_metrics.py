"""Metrics checked against their definitions."""

import math

import numpy as np
import pytest
import torch

from hpgr_plugin import metrics


def sample(seed: int, *, ties: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    users = random.geometric(0.05, 800) * 11
    labels = random.integers(0, 2, 800)
    scores = random.random(800)
    return labels, np.round(scores, 1) if ties else scores, users


def pairwise_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    positive, negative = scores[labels == 1], scores[labels == 0]
    return float(np.mean(np.sign(positive[:, None] - negative[None]) / 2 + 0.5))


@pytest.mark.parametrize("ties", [False, True])
def test_auc_counts_pairs(ties: bool) -> None:
    labels, scores, _ = sample(0, ties=ties)
    assert metrics.auc(labels, scores) == pytest.approx(pairwise_auc(labels, scores), abs=1e-12)


def test_auc_keeps_the_order_of_close_scores() -> None:
    labels = np.array([0, 1] * 50)
    scores = 0.999999 + np.arange(100) * 1e-12
    assert metrics.auc(labels, scores) == pytest.approx(pairwise_auc(labels, scores), abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("weighting", ["impressions", "users"])
def test_gauc_is_the_mean_of_each_users_auc(ties: bool, weighting: str) -> None:
    labels, scores, users = sample(1, ties=ties)
    each, weights = [], []
    for user in np.unique(users):
        own = users == user
        if 0 < labels[own].sum() < own.sum():
            each.append(pairwise_auc(labels[own], scores[own]))
            weights.append(own.sum() if weighting == "impressions" else 1)
    assert len(each) < len(np.unique(users))
    expected = np.average(each, weights=weights)
    assert metrics.gauc(labels, scores, users, weighting) == pytest.approx(expected, abs=1e-12)


def test_log_loss_and_normalised_entropy() -> None:
    labels, scores, _ = sample(2, ties=False)
    tensor = torch.tensor(scores), torch.tensor(labels, dtype=torch.float64)
    loss = torch.nn.functional.binary_cross_entropy(*tensor).item()
    assert metrics.log_loss(labels, scores) == pytest.approx(loss)
    always_mean = np.full(len(labels), labels.mean())
    assert metrics.normalized_entropy(labels, always_mean) == pytest.approx(1)
    expected = loss / metrics.log_loss(labels, always_mean)
    assert metrics.normalized_entropy(labels, scores) == pytest.approx(expected)


def test_all_together_and_from_tensors() -> None:
    labels, scores, users = sample(3, ties=True)
    found = metrics.ranking_metrics(torch.tensor(labels), torch.tensor(scores), torch.tensor(users))
    assert found == {
        "auc": metrics.auc(labels, scores),
        "gauc": metrics.gauc(labels, scores, users),
        "log_loss": metrics.log_loss(labels, scores),
        "ne": metrics.normalized_entropy(labels, scores),
    }


def test_all_ties_and_one_label() -> None:
    users = np.array([0, 0, 1, 1])
    tied = np.full(4, 0.5)
    assert metrics.auc([0, 1, 0, 1], tied) == pytest.approx(0.5)
    assert metrics.gauc([0, 1, 0, 1], tied, users) == pytest.approx(0.5)
    assert math.isnan(metrics.auc([1, 1, 1, 1], tied))
    assert math.isnan(metrics.gauc([0, 0, 1, 1], tied, users))
    assert math.isnan(metrics.normalized_entropy([0, 0, 0, 0], tied))


def test_certain_and_wrong_is_finite() -> None:
    assert metrics.log_loss([1, 0], [0.0, 1.0]) == pytest.approx(-math.log(1e-7), rel=1e-6)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="probabilities"):
        metrics.log_loss([0, 1], [-2.0, 3.0])
    with pytest.raises(ValueError, match="probabilities"):
        metrics.auc([0, 1], [0.5, float("nan")])
    with pytest.raises(ValueError, match="0 or 1"):
        metrics.auc([0, 2], [0.1, 0.2])
    with pytest.raises(ValueError, match="one length"):
        metrics.auc([0, 1], [0.1])
    with pytest.raises(ValueError, match="users has shape"):
        metrics.gauc([0, 1], [0.1, 0.2], [1])
    with pytest.raises(ValueError, match="'items'"):
        metrics.gauc([0, 1], [0.1, 0.2], [1, 1], "items")
