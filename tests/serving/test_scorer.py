"""What is served is what was evaluated: the same requests get the same probabilities."""

from collections.abc import Callable
from pathlib import Path

import gin
import numpy as np
import pytest
import torch
from small_requests import requests_of

from hpgr_plugin.config.registry import ConfigError, build
from hpgr_plugin.config.scopes import config_scope
from hpgr_plugin.data.requests import build_requests
from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.hosts.embedded.train.checkpoint import load_checkpoint, load_weights
from hpgr_plugin.hosts.embedded.train.stages import build_ranker
from hpgr_plugin.serving import Request, RequestError, Scorer
from hpgr_plugin.serving.vocabulary import Vocabulary

ROWS = ["hstu", "mtgr", "base", "pgsa", "pgsa_recent", "pgsa_recent_shared", "sem", "full"]
ROWS += ["full_shared", "sasrec", "base_absolute"]


def evaluated(task: Task, row: str, folder: Path) -> np.ndarray:
    """The trainer's evaluation of the test split, in the order of its requests."""
    with config_scope(row):
        model = build_ranker(task).eval()
    state = load_checkpoint(folder.parent / row / "checkpoint.pt", torch.device("cpu"))
    load_weights(folder, model, state["best_model"])
    loader = task.loader("test")
    requests = build_requests(task.data, "test", task.requests)
    order = np.concatenate(loader._plan(0))
    scores = task.score(model, loader).scores
    parts = np.split(scores, np.cumsum(requests.candidate_count[order])[:-1])
    by_place = dict(zip(order.tolist(), parts, strict=True))
    return np.concatenate([by_place[place] for place in range(len(requests))])


@pytest.mark.parametrize("row", ROWS)
def test_served_scores_are_those_of_the_evaluation(
    row: str, trained: Callable[..., tuple[Task, Path]]
) -> None:
    task, folder = trained(row)
    expected = evaluated(task, row, folder)
    requests = requests_of(task.data, task.requests)
    gin.clear_config()  # a server knows nothing of the training's configuration
    for cache_mib in (0, 64):
        scorer = Scorer.load(folder, device="cpu", cache_mib=cache_mib)
        for _ in range(2):
            answers = scorer.score(requests)
            scores = np.concatenate([answer.probabilities for answer in answers])
            np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)
    # One sequence per candidate, or an encoder without layers: nothing is shared.
    keeps = row not in ("pgsa_recent", "full", "sasrec")
    assert (scorer.cache.counts.hits > 0) == keeps


@pytest.mark.gpu
@pytest.mark.parametrize("cache_mib", [0, 64])
@pytest.mark.parametrize("row", ROWS)
def test_scores_on_a_gpu_are_those_on_a_cpu(
    row: str, cache_mib: int, trained: Callable[..., tuple[Task, Path]]
) -> None:
    task, folder = trained(row)
    requests = requests_of(task.data, task.requests)
    expected = Scorer.load(folder, device="cpu", cache_mib=0).score(requests)
    scorer = Scorer.load(folder, device="cuda", cache_mib=cache_mib)
    for _ in range(2):
        for answer, wanted in zip(scorer.score(requests), expected, strict=True):
            np.testing.assert_allclose(
                answer.probabilities, wanted.probabilities, rtol=0, atol=1e-4
            )
            assert answer.history_version == wanted.history_version
    assert scorer.device.type == next(scorer.model.parameters()).device.type == "cuda"


def test_reading_a_folder_leaves_the_configuration_alone(
    trained: Callable[..., tuple[Task, Path]],
) -> None:
    _, folder = trained("base", "hpgr.run.mode = 'evaluate'")
    before = gin.config_str()
    Scorer.load(folder, device="cpu")
    assert gin.config_str() == before
    assert build("RequestSettings").max_history == 60


def simple(**changes: object) -> Request:
    fields: dict = {
        "history_items": [],
        "history_times": [],
        "history_actions": [],
        "candidates": [],
        "times": 10,
    }
    return Request(**{**fields, **changes})


def test_unknown_items_are_left_out_of_the_history_and_get_no_score(
    trained: Callable[..., tuple[Task, Path]],
) -> None:
    task, folder = trained("hstu")
    scorer = Scorer.load(folder, device="cpu")
    known = task.data.log.item_ids[:3].tolist()
    plain, mixed, nothing = scorer.score(
        [
            simple(
                history_items=known[:2],
                history_times=[1, 2],
                history_actions=[0, 1],
                candidates=known,
            ),
            simple(
                history_items=[known[0], 10**9, known[1]],
                history_times=[1, 1, 2],
                history_actions=[0, 1, 1],
                candidates=[known[0], 10**9, known[1], known[2]],
            ),
            simple(candidates=[10**9]),
        ]
    )
    assert mixed.unknown_history == 1
    assert mixed.unknown_candidates == [1]
    assert mixed.history_version == plain.history_version
    np.testing.assert_allclose(mixed.probabilities[[0, 2, 3]], plain.probabilities, atol=1e-6)
    assert np.isnan(mixed.probabilities[1])
    assert np.isnan(nothing.probabilities).all()


def test_a_request_that_cannot_be_scored_names_the_field(
    trained: Callable[..., tuple[Task, Path]],
) -> None:
    task, folder = trained("hstu")
    scorer = Scorer.load(folder, device="cpu")
    one, two = task.data.log.item_ids[:2].tolist()
    history = {"history_items": [one, two], "history_times": [1, 2], "history_actions": [0, 1]}
    for field, changes in {
        "candidates[0]": {"candidates": ["x"]},
        "candidates[1]": {"candidates": [one, True]},
        "times": {"candidates": [one], "times": [1, 2]},
        "times[0]": {"candidates": [one], "times": [1.5]},
        "history.times": {**history, "history_times": [1]},
        "history.times[1]": {**history, "history_times": [2, 1]},
        "history.actions": {**history, "history_actions": None},
        "history.actions[1]": {**history, "history_actions": [0, 7]},
        "user_features.age": {"user_features": {"age": 3}},
    }.items():
        with pytest.raises(RequestError) as raised:
            scorer.score([simple(**changes)])
        assert raised.value.field == field


def test_what_comes_later_than_the_candidates_is_not_read(
    trained: Callable[..., tuple[Task, Path]],
) -> None:
    task, folder = trained("base")
    scorer = Scorer.load(folder, device="cpu")
    ids = task.data.log.item_ids[:4].tolist()
    cut = simple(
        history_items=ids[:2], history_times=[1, 2], history_actions=[0, 1], candidates=ids
    )
    whole = simple(
        history_items=ids,
        history_times=[1, 2, 10, 11],
        history_actions=[0, 1, 1, 1],
        candidates=ids,
    )
    first, second = scorer.score([cut, whole])
    assert second.history_length == 2
    np.testing.assert_allclose(first.probabilities, second.probabilities, atol=1e-6)


def test_a_model_that_numbers_the_history_by_its_candidate(
    trained: Callable[..., tuple[Task, Path]],
) -> None:
    """Without `hide_future` a sequence takes one candidate; a served request takes any number."""
    task, folder = trained(
        "base",
        "hpgr.TimeAwarePositionalEncoder.hide_future = False",
        "hpgr.RequestSettings.max_candidates = 1",
    )
    expected = evaluated(task, "base", folder)
    scorer = Scorer.load(folder, device="cpu")
    requests = requests_of(task.data, task.requests)
    scores = np.concatenate([answer.probabilities for answer in scorer.score(requests)])
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)
    first = requests[0]
    several = Request(**{**vars(first), "candidates": [*first.candidates] * 3, "times": 10**10})
    (answer,) = scorer.score([several])
    assert np.ptp(answer.probabilities) < 1e-6
    with pytest.raises(RequestError, match="one time for all candidates"):
        scorer.score([Request(**{**vars(several), "times": [1, 2, 3]})])


def test_statistics_cannot_be_served(trained: Callable[..., tuple[Task, Path]]) -> None:
    with pytest.raises(ConfigError, match=r"hpgr\.HSTURanker\.statistics must be None"):
        trained("hstu", "hpgr.HSTURanker.statistics = 'linear'")


def test_a_layout_that_the_training_chose_is_served(
    trained: Callable[..., tuple[Task, Path]],
) -> None:
    hook = "recency_shared/hpgr.PreferenceGuidedSparseAttention"
    task, folder = trained("pgsa_recent_shared", f"{hook}.layout = 'auto'")
    expected = evaluated(task, "pgsa_recent_shared", folder)
    with config_scope("pgsa_recent_shared"):
        layout = build_ranker(task).attention_hook.layout  # type: ignore[union-attr]
    scorer = Scorer.load(folder, device="cpu")
    assert scorer.model.attention_hook is not None
    assert scorer.model.attention_hook.layout == layout
    answers = scorer.score(requests_of(task.data, task.requests))
    scores = np.concatenate([answer.probabilities for answer in answers])
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("known", [[3, 4, 7, 30], [3, 10**15], [-(2**63), -5, 2**63 - 1], [9]])
def test_items_are_found_with_and_without_a_table(known: list[int]) -> None:
    vocabulary = Vocabulary(np.array(known), None, 2, np.zeros(0, np.int64))
    asked = [*known, 2, 5, -(2**63), 2**63 - 1, 31, *known]
    wanted = [known.index(item) if item in known else -1 for item in asked]
    assert vocabulary.items(asked, "candidates").tolist() == wanted
    assert vocabulary.items([], "candidates").tolist() == []
    for bad in (2**63, True, "3", 1.0):
        with pytest.raises(RequestError, match=r"candidates\[1\]"):
            vocabulary.items([3, bad], "candidates")
