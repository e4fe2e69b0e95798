"""Scores with kept histories equal those of the whole model; new events extend what is kept."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from hpgr_plugin.components.attention_hooks import (
    AttentionHook,
    PreferenceGuidedSparseAttention,
    StochasticLength,
)
from hpgr_plugin.components.positions import TimeAwarePositionalEncoder
from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.data.batch import Batch
from hpgr_plugin.hosts.embedded.model.hstu import HSTULayer, SequenceLayer
from hpgr_plugin.hosts.embedded.model.mtgr import MTGRLayer
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker
from hpgr_plugin.serving import cached_encoder
from hpgr_plugin.serving.cached_encoder import CachedEncoder
from hpgr_plugin.serving.history_cache import HistoryCache, HistoryState
from hpgr_plugin.serving.kept_rows import ServedPreferences

DIM, ITEMS, YEAR = 16, 50, 10**6


def pgsa(**settings: object) -> PreferenceGuidedSparseAttention:
    return PreferenceGuidedSparseAttention(**{"layout": "shared_history", **settings})  # type: ignore[arg-type]


HOOKS: dict[str, Callable[[], AttentionHook | None]] = {
    "dense": lambda: None,
    "recent": lambda: pgsa(top_k=3, sigma=1.0, recent=4),
    "paper": lambda: pgsa(top_k=50, sigma=2.0),
    "anchors only, before the gate": lambda: pgsa(top_k=3, mask_position="pre"),
    "no anchors": lambda: pgsa(top_k=0, recent=5),
    "frozen": lambda: pgsa(top_k=4, table="frozen"),
    "cosine": lambda: pgsa(top_k=4, score="cosine"),
    "stochastic length": lambda: StochasticLength(alpha=1.5),
}


def ranker(
    layer: type[SequenceLayer] = HSTULayer,
    hook: AttentionHook | None = None,
    *,
    sem: bool = False,
    relative_bias: bool = True,
) -> HSTURanker:
    model = HSTURanker(
        num_items=ITEMS,
        num_actions=3,
        vocabulary_digest="",
        user_feature_sizes={"age": 4},
        item_feature_codes={"genre": torch.randint(0, 5, (ITEMS,))},
        embedding_dim=DIM,
        num_layers=3,
        layer=layer,
        max_history=100,
        relative_bias=relative_bias,
        positional_encoder=TimeAwarePositionalEncoder(embedding_dim=DIM, max_positions=101),
        sem=SessionEnhancementModule(embedding_dim=DIM, causal=True, gap_seconds=9000)
        if sem
        else None,
        attention_hook=hook,
    ).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def served(model: HSTURanker, max_bytes: int = 10**9) -> CachedEncoder:
    """Change the model into one with a cache; its new encoder."""
    encoder = CachedEncoder(model.encoder, HistoryCache(max_bytes))
    model.encoder = encoder  # type: ignore[assignment]
    if isinstance(model.attention_hook, PreferenceGuidedSparseAttention):
        model.attention_hook = ServedPreferences(model.attention_hook)
    return encoder


def offsets(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def requests(
    lengths: Sequence[int] = (40, 0, 7, 100),
    counts: Sequence[int] = (5, 3, 1, 20),
    *,
    one_time: bool = True,
) -> Batch:
    items, candidates = sum(lengths), sum(counts)

    def times(sizes: Sequence[int]) -> torch.Tensor:
        return torch.cat([torch.randint(0, YEAR, (n,)).sort().values for n in sizes])

    return Batch(
        history_items=torch.randint(0, ITEMS, (items,)),
        history_timestamps=times(lengths),
        history_actions=torch.randint(0, 3, (items,)),
        history_offsets=offsets(lengths),
        candidate_items=torch.randint(0, ITEMS, (candidates,)),
        candidate_timestamps=torch.full((candidates,), 2 * YEAR) if one_time else times(counts),
        candidate_labels=torch.zeros(candidates),
        candidate_offsets=offsets(counts),
        users=torch.arange(len(lengths)),
        user_features={"age": torch.randint(0, 4, (len(lengths),))},
    )


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
        monkeypatch.setattr(cached_encoder, "_CHUNK_ELEMENTS", 300)
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
