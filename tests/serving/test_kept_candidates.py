"""Requests that read nothing of a kept history but its keys and values score as the model does."""

import numpy as np
import pytest
import torch
from small_models import DIM, HOOKS, ITEMS, compute_in_chunks, ranker
from small_scorers import NOW, forget_how_to_read_histories, probabilities, request, same, scorer

from hpgr_plugin.components.positions import TimeAwarePositionalEncoder
from hpgr_plugin.hosts.embedded.model.hstu import HSTULayer, SequenceLayer
from hpgr_plugin.hosts.embedded.model.mtgr import MTGRLayer
from hpgr_plugin.hosts.embedded.model.positions import LearnedPositionalEncoder
from hpgr_plugin.serving import kept_attention
from hpgr_plugin.serving.cached_encoder import few


@pytest.mark.parametrize("chunk", [300, 2**18])
@pytest.mark.parametrize("sem", [False, True], ids=["", "sem"])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("layer", [HSTULayer, MTGRLayer])
def test_scores_equal_those_of_the_model(
    layer: type[SequenceLayer],
    hook: str,
    sem: bool,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compute_in_chunks(monkeypatch, chunk)
    model = ranker(layer, HOOKS[hook](), sem=sem)
    if hook == "frozen":
        model.attention_hook.freeze(torch.randn(ITEMS, DIM))  # type: ignore[union-attr]
    whole, kept = scorer(model, 0), scorer(model)
    users = [(0, 40), (1, 1), (2, 100)]
    kept.score([request(user, length, 1) for user, length in users])
    forget_how_to_read_histories(kept)
    for _ in range(2):
        asked = [request(*user, count) for user, count in zip(users, (5, 3, 20), strict=True)]
        same(kept.score(asked), whole.score(asked))
    assert vars(kept.cache.counts) == {"hits": 6, "extended": 0, "misses": 3, "evicted": 0}


@pytest.mark.parametrize("positions", ["relative", "learned"])
def test_other_positions_and_no_bias(positions: str) -> None:
    model = ranker(hook=HOOKS["recent"](), relative_bias=positions == "relative")
    if positions == "relative":
        encoder = TimeAwarePositionalEncoder(embedding_dim=DIM, form="relative")
        model.positional_encoder = encoder
    else:
        model.positional_encoder = LearnedPositionalEncoder(embedding_dim=DIM, max_positions=100)
    whole, kept = scorer(model, 0), scorer(model)
    asked = [request(0, 60, 9)]
    kept.score(asked)
    forget_how_to_read_histories(kept)
    same(kept.score(asked), whole.score(asked))


@pytest.mark.parametrize("relative_bias", [True, False])
@pytest.mark.parametrize("hook", ["recent", "anchors only, before the gate", "no anchors"])
def test_slots_by_their_operator(
    hook: str, relative_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU runs, on the operator's backend for a CPU."""
    monkeypatch.setattr(kept_attention, "by_kernel", lambda kept: kept is not None and few(kept))
    model = ranker(hook=HOOKS[hook](), relative_bias=relative_bias)
    whole, kept = scorer(model, 0), scorer(model)
    asked = [request(0, 100, 9), request(1, 90, 5)]
    for _ in range(2):
        same(kept.score(asked), whole.score(asked))
    assert kept.cache.counts.hits == 2


@pytest.mark.parametrize("hook", ["dense", "recent"])
def test_kept_and_other_histories_in_one_batch(hook: str) -> None:
    model = ranker(hook=HOOKS[hook]())
    whole, kept = scorer(model, 0), scorer(model)
    kept.score([request(1, 30, 4)])
    asked = [
        request(0, 20, 4),
        request(1, 30, 5),
        request(2, 0, 3),
        request(1, 30, 2, candidates=[ITEMS, 3, 4]),
        request(1, 31, 6),  # a new event
        request(0, 20, 3, times=[NOW, NOW + 5, 10]),
        request(0, 20, 2, candidates=[ITEMS]),
    ]
    for _ in range(2):
        same(kept.score(asked), whole.score(asked))


@pytest.mark.parametrize("layer", [HSTULayer, MTGRLayer])
def test_what_changes_a_kept_history_is_seen(layer: type[SequenceLayer]) -> None:
    model = ranker(layer)
    whole, kept = scorer(model, 0), scorer(model)
    middle = request(0, 50, 1).history_times[20]
    for changes in (
        {},
        {"user_features": {"age": "2"}},
        {"history_actions": [1] * 50},
        {"times": [middle, NOW, NOW]},  # MTGR: fewer items are seen by all
        {"times": NOW},
        {"times": NOW + 10**6},
    ):
        asked = [request(0, 50, 3, **changes)]
        for _ in range(2):
            same(kept.score(asked), whole.score(asked))


def test_a_cache_with_room_for_keys_and_values_only() -> None:
    model = ranker(hook=HOOKS["recent"]())
    whole, kept = scorer(model, 0), scorer(model)
    asked = [request(0, 50, 6)]
    kept.score(asked)
    kept.cache.max_bytes = kept.cache.num_bytes
    for _ in range(2):
        same(kept.score(asked), whole.score(asked))
    assert kept.cache.counts.hits == 2
    assert kept.cache.num_bytes <= kept.cache.max_bytes


def test_what_is_made_for_further_requests_is_counted() -> None:
    kept = scorer(ranker(hook=HOOKS["recent"]()))
    kept.score([request(0, 50, 6)])
    before = kept.cache.num_bytes
    for _ in range(2):
        kept.score([request(0, 50, 6)])
    assert kept.cache.num_bytes >= before + 50 * DIM * 4  # the embeddings that are scored
    kept.cache.drop(("user", 0))
    assert kept.cache.num_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [300, 2**27])
@pytest.mark.parametrize("relative_bias", [True, False])
@pytest.mark.parametrize("hook", ["dense", "recent", "paper", "anchors only, before the gate"])
@pytest.mark.parametrize("layer", [HSTULayer, MTGRLayer])
def test_scores_on_a_gpu_are_those_on_a_cpu(
    layer: type[SequenceLayer],
    hook: str,
    relative_bias: bool,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compute_in_chunks(monkeypatch, chunk)
    model = ranker(layer, HOOKS[hook](), relative_bias=relative_bias)
    whole, kept = scorer(model, 0), scorer(model, device="cuda")
    asked = [request(user, length, 9) for user, length in ((0, 40), (1, 1), (2, 100))]
    wanted = probabilities(whole.score(asked))
    for _ in range(3):
        actual = probabilities(kept.score(asked))
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-4)
    assert kept.cache.counts.hits == 6
