"""Slate metrics by hand, and which items go together."""

import math

import numpy as np
import pytest
import torch

from hpgr_plugin.hosts.embedded.slates.evaluation import (
    Outcomes,
    difference,
    list_metrics,
    load_outcomes,
    save_outcomes,
)
from hpgr_plugin.hosts.embedded.slates.items import _taken_together, draw_positives


def test_list_metrics_by_hand() -> None:
    slate = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    target = np.array([[3, 1, 10, 11], [1, 2, -1, -1], [7, -1, -1, -1]])
    counted = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=bool)
    found = list_metrics(slate, target, counted)
    discount = [1 / math.log2(place + 2) for place in range(3)]
    assert found["hit"][:2].tolist() == [1, 0]
    assert found["recall"][:2].tolist() == [0.5, 0]
    assert found["ndcg"][:2] == pytest.approx([(discount[0] + discount[2]) / sum(discount), 0])
    assert all(np.isnan(values[2]) for values in found.values())


def test_a_perfect_slate_has_one_everywhere() -> None:
    slate = np.array([[5, 4, 3, 2, 1]])
    found = Outcomes(np.array([0]), slate, slate[:, ::-1], np.ones((1, 5), dtype=bool)).metrics()
    assert set(found.values()) == {1.0}
    assert set(found) == {f"{p}{m}@5" for p in ("", "liked_") for m in ("hit", "recall", "ndcg")}


def made(hits: np.ndarray) -> Outcomes:
    """One item per slate, which the user took or not."""
    target = np.ones((len(hits), 1), dtype=np.int64)
    return Outcomes(np.arange(len(hits)), hits.reshape(-1, 1) * 1, target, target > 0)


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(400) < 0.3
    better = base | (rng.random(400) < 0.1)
    found = difference([made(better)], [made(base)], "ndcg")
    assert found.value == pytest.approx(better.mean() - base.mean())
    assert 0 < found.low < found.value < found.high
    assert found.relative == pytest.approx(better.mean() / base.mean() - 1)
    same = difference([made(base)], [made(base)], "hit")
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_other_requests_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="not of the same requests"):
        difference([made(np.ones(3))], [made(np.ones(4))], "hit")


def test_outcomes_survive_the_disk(tmp_path) -> None:
    found = made(np.array([1, 0, 1]))
    save_outcomes(tmp_path / "s.npz", found)
    for a, b in zip(load_outcomes(tmp_path / "s.npz"), found, strict=True):
        assert np.array_equal(a, b)


class _Log:
    def __init__(self) -> None:
        # Three users: 0, 1 and 2 go together twice or more, 3 comes once.
        self.item = np.array([0, 1, 2, 0, 1, 3, 2, 1])
        self.num_items = 5
        self._users = np.array([0, 0, 0, 1, 1, 1, 2, 2])

    def event_users(self) -> np.ndarray:
        return self._users


class _Data:
    log = _Log()
    is_history = np.ones(8, dtype=bool)
    split = np.zeros(8, dtype=np.int8)


def test_items_taken_together() -> None:
    found = _taken_together(_Data(), window=1, most=2)
    assert sorted(found[1].tolist()) == [0, 2]
    assert found[0].tolist() == [1, -1]
    assert found[3].tolist() == [-1, -1]
    assert found[4].tolist() == [-1, -1]


def test_a_positive_is_drawn_from_those_of_the_item() -> None:
    positives = torch.tensor([[3, 4, -1], [-1, -1, -1], [5, -1, -1]])
    drawn, has_one = draw_positives(positives, torch.tensor([0, 1, 2] * 20))
    assert set(drawn[::3].tolist()) == {3, 4}
    assert set(drawn[2::3].tolist()) == {5}
    assert has_one.tolist() == [True, False, True] * 20
