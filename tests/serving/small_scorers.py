"""Scorers of small rankers, and requests for them."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from small_models import ITEMS

from hpgr_plugin.data.requests import RequestSettings
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker
from hpgr_plugin.serving import Request, Scorer, Scores
from hpgr_plugin.serving.folder import ServedModel
from hpgr_plugin.serving.vocabulary import UserFeature, Vocabulary

NOW = 2 * 10**6


def scorer(
    model: HSTURanker, cache_mib: int = 64, device: str = "cpu", *, capture: bool = True
) -> Scorer:
    ages = UserFeature(np.array(["1", "2", "3"]), np.array([1, 2, 3], np.int32))
    vocabulary = Vocabulary(np.arange(ITEMS), np.arange(3), 3, np.arange(3), {"age": ages})
    served = ServedModel(copy.deepcopy(model), RequestSettings(max_history=100), vocabulary, {})
    return Scorer(served, device=device, cache_mib=cache_mib, capture=capture)


def request(user: int, length: int, count: int, **changes: object) -> Request:
    """The same user always has the same events."""
    draw = np.random.default_rng(user)
    items, actions = draw.integers(0, ITEMS, 100), draw.integers(0, 3, 100)
    times = np.sort(draw.integers(0, 10**6, 100))
    fields: dict = {
        "history_items": items[:length].tolist(),
        "history_times": times[:length].tolist(),
        "history_actions": actions[:length].tolist(),
        "candidates": np.random.default_rng([user, length, count])
        .integers(0, ITEMS, count)
        .tolist(),
        "times": NOW,
        "user_id": user,
    }
    return Request(**{**fields, **changes})


def probabilities(answers: Sequence[Scores]) -> np.ndarray:
    return np.concatenate([answer.probabilities for answer in answers])


def same(actual: Sequence[Scores], expected: Sequence[Scores]) -> None:
    wanted = probabilities(expected)
    assert np.nanmax(wanted) - np.nanmin(wanted) > 1e-3
    # A test model's weights are large: its logits reach tens.
    np.testing.assert_allclose(probabilities(actual), wanted, rtol=0, atol=1e-5)


def forget_how_to_read_histories(one: Scorer) -> None:
    """From now on, scores of histories that are not kept are others."""
    with torch.no_grad():
        assert one.model.action_table is not None
        one.model.action_table.weight += 1.0
