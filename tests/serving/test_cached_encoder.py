"""Scores with kept histories equal those of the whole model; new events extend what is kept."""

from collections.abc import Sequence

import pytest
import torch
from small_models import DIM, HOOKS, ITEMS, compute_in_chunks, offsets, ranker, requests

from hpgr_plugin.components.attention_hooks import (
    PreferenceGuidedSparseAttention,
)
from hpgr_plugin.data.batch import Batch
from hpgr_plugin.hosts.embedded.model.hstu import HSTULayer, SequenceLayer
from hpgr_plugin.hosts.embedded.model.mtgr import MTGRLayer
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker
from hpgr_plugin.serving.cached_encoder import CachedEncoder
from hpgr_plugin.serving.history_cache import HistoryCache, HistoryState
from hpgr_plugin.serving.kept_rows import ServedPreferences


def served(model: HSTURanker, max_bytes: int = 10**9) -> CachedEncoder:
    """Change the model into one with a cache; its new encoder."""
    encoder = CachedEncoder(model.encoder, HistoryCache(max_bytes))
    model.encoder = encoder  # type: ignore[assignment]
    if isinstance(model.attention_hook, PreferenceGuidedSparseAttention):
        model.attention_hook = ServedPreferences(model.attention_hook)
    return encoder


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("one_time", [True, False], ids=["one-time", "own-times"])
@pytest.mark.parametrize("sem", [False, True], ids=["", "sem"])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("layer", [HSTULayer, MTGRLayer])
@torch.no_grad()
def test_cached_equals_uncached(
    layer: type[SequenceLayer], hook: str, sem: bool, one_time: bool
) -> None:
    model, batch = ranker(layer, HOOKS[hook](), sem=sem), requests(one_time=one_time)
    if hook == "frozen":
        model.attention_hook.freeze(torch.randn(ITEMS, DIM))  # type: ignore[union-attr]
    expected = model(batch)
    encoder = served(model)
    encoder.for_users("abcd")
    close(model(batch), expected)
    assert vars(encoder.cache.counts) == {"hits": 0, "extended": 0, "misses": 4, "evicted": 0}
    close(model(batch), expected)
    assert encoder.cache.counts.hits == 4
    assert encoder.cache.counts.misses == 4


@torch.no_grad()
def test_small_chunks_and_no_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    for hook in ("dense", "recent"):
        model, batch = ranker(hook=HOOKS[hook](), relative_bias=False), requests(one_time=False)
        expected = model(batch)
        compute_in_chunks(monkeypatch, 300)
        encoder = served(model)
        encoder.for_users("abcd")
        close(model(batch), expected)
        monkeypatch.undo()


def grown(batch: Batch, lengths: Sequence[int]) -> Batch:
    """The first items of the only user's history, with the user's candidates."""
    (length,) = lengths
    part = {
        name: getattr(batch, name)[:length]
        for name in ("history_items", "history_timestamps", "history_actions")
    }
    return Batch(**{**vars(batch), **part, "history_offsets": offsets(lengths)})


@pytest.mark.parametrize("sem", [False, True], ids=["", "sem"])
@pytest.mark.parametrize("hook", ["dense", "recent"])
@torch.no_grad()
def test_new_events_extend_what_is_kept(hook: str, sem: bool) -> None:
    model, batch = ranker(hook=HOOKS[hook](), sem=sem), requests([60], [9])
    steps = [grown(batch, [length]) for length in (0, 1, 20, 59, 60)]
    expected = [model(step) for step in steps]
    encoder = served(model)
    encoder.for_users(["user"])
    for step, scores in zip(steps, expected, strict=True):
        close(model(step), scores)
    assert encoder.cache.counts.extended == 4
    assert encoder.cache.counts.misses == 1


@pytest.mark.parametrize("change", ["item", "action", "time", "user feature"])
@torch.no_grad()
def test_another_history_of_a_user_is_encoded_anew(change: str) -> None:
    model, batch = ranker(), requests([30], [4])
    encoder = served(model)
    encoder.for_users(["user"])
    model(batch)
    other = Batch(**vars(batch))
    if change == "user feature":
        other.user_features = {"age": (batch.user_features["age"] + 1) % 4}
    else:
        name = {"item": "items", "action": "actions", "time": "timestamps"}[change]
        values = getattr(batch, f"history_{name}").clone()
        values[0] = 0 if change == "time" else (values[0] + 1) % 3
        setattr(other, f"history_{name}", values)
    scores = model(other)
    assert encoder.cache.counts.misses == 2
    encoder.for_users(None)
    close(scores, model(other))


@torch.no_grad()
def test_equal_versions_are_trusted_where_marks_are_equal() -> None:
    model, batch = ranker(), requests([30], [4])
    encoder = served(model)
    encoder.for_users(["user"], ["first"])
    wanted = model(batch)
    close(model(batch), wanted)
    assert encoder.cache.counts.hits == 1
    later = Batch(**{**vars(batch), "history_timestamps": batch.history_timestamps + 1})
    model(later)  # its marks differ
    assert encoder.cache.counts.misses == 2
    encoder.for_users(["user"], ["second"])
    close(model(later), model(later))
    assert encoder.cache.counts.hits == 3  # found by comparing the tokens
    other = Batch(**{**vars(later), "history_items": (batch.history_items + 1) % ITEMS})
    encoder.for_users(["user"], ["third"])
    model(other)
    assert encoder.cache.counts.misses == 3


@torch.no_grad()
def test_a_plan_of_another_hook_is_taken() -> None:
    class Other(PreferenceGuidedSparseAttention):
        """Planned by itself: a subclass may do otherwise."""

    for one_time in (True, False):
        hook = Other(top_k=3, sigma=1.0, recent=4, layout="shared_history")
        model, batch = ranker(hook=hook), requests(one_time=one_time)
        expected = model(batch)
        encoder = served(model)
        model.attention_hook = hook
        encoder.for_users("abcd")
        close(model(batch), expected)
        assert encoder.cache.counts.misses == 4


@torch.no_grad()
def test_mtgr_is_encoded_anew_where_its_mask_changes() -> None:
    model, batch = ranker(MTGRLayer), requests([30], [4])
    shorter = grown(batch, [29])
    expected = model(shorter), model(batch)
    encoder = served(model)
    encoder.for_users(["user"])
    close(model(shorter), expected[0])
    close(model(batch), expected[1])
    assert encoder.cache.counts.misses == 2


@torch.no_grad()
def test_one_sequence_per_candidate_goes_through_the_trained_encoder() -> None:
    hook = PreferenceGuidedSparseAttention(top_k=3, recent=4)
    model, batch = ranker(hook=hook), requests()
    expected = model(batch)
    encoder = served(model)
    encoder.for_users("abcd")
    close(model(batch), expected)
    assert len(encoder.cache) == 0


def state(count: int) -> HistoryState:
    tokens = torch.zeros(count, 4)
    return HistoryState(tokens, torch.zeros(count, 5).long(), (tokens,), (tokens,))


def test_the_least_recently_used_history_goes_first() -> None:
    one = state(10)
    cache = HistoryCache(max_bytes=3 * one.num_bytes)
    for user in "abc":
        cache.put(user, state(10))
    assert cache.get("a") is not None
    cache.put("d", state(10))
    assert [user for user in "abcd" if cache.get(user)] == ["a", "c", "d"]
    assert cache.num_bytes == 3 * one.num_bytes
    cache.put("e", state(25))
    assert cache.get("e") is not None
    assert cache.num_bytes <= cache.max_bytes
    assert cache.counts.evicted == 4


def test_a_history_larger_than_the_bound_is_not_kept() -> None:
    cache = HistoryCache(max_bytes=state(10).num_bytes)
    cache.put("a", state(10))
    cache.put("b", state(11))
    assert cache.get("a") is not None
    assert cache.get("b") is None
    cache.put("a", state(11))
    assert cache.get("a") is None
    assert cache.num_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [300, 2**27])
@pytest.mark.parametrize("one_time", [True, False], ids=["one-time", "own-times"])
@pytest.mark.parametrize("sem", [False, True], ids=["", "sem"])
@pytest.mark.parametrize("hook", ["dense", "recent", "anchors only, before the gate"])
@pytest.mark.parametrize("layer", [HSTULayer, MTGRLayer])
@torch.no_grad()
def test_on_a_gpu(
    layer: type[SequenceLayer],
    hook: str,
    sem: bool,
    one_time: bool,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch = ranker(layer, HOOKS[hook](), sem=sem), requests(one_time=one_time)
    expected = model(batch)
    compute_in_chunks(monkeypatch, chunk)
    model.cuda()
    encoder = served(model)
    encoder.for_users("abcd")
    for _ in range(2):
        torch.testing.assert_close(model(batch.to("cuda")).cpu(), expected, rtol=0, atol=1e-4)
    assert encoder.cache.counts.hits == 4
