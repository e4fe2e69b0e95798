"""Requests in tensors of a fixed size, and CUDA graphs of them, score as the model does."""

import logging
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from small_models import DIM, HOOKS, ITEMS, compute_in_chunks, pgsa, ranker
from small_scorers import forget_how_to_read_histories, probabilities, request, same, scorer
from waits import Waits

from hpgr_plugin.components.positions import TimeAwarePositionalEncoder
from hpgr_plugin.hosts.embedded.model.hstu import HSTULayer, SequenceLayer
from hpgr_plugin.hosts.embedded.model.mtgr import MTGRLayer
from hpgr_plugin.hosts.embedded.model.positions import LearnedPositionalEncoder
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker
from hpgr_plugin.hosts.embedded.model.rare_items import RareItems
from hpgr_plugin.serving import Request, Scorer, Scores, anchors, captured, kept_attention
from hpgr_plugin.serving.cached_encoder import few
from hpgr_plugin.serving.captured import CapturedCandidates
from hpgr_plugin.serving.padded import PaddedRequest, Sizes

gpu = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _ties_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(anchors._SPARE, "cpu", anchors._SPARE["cuda"])


def capturing(model: HSTURanker, **settings: int) -> Scorer:
    """A scorer on a CPU that runs what a GPU captures."""
    one = scorer(model)
    assert one.captured is None
    assert one._candidates is not None
    one.captured = CapturedCandidates(one._candidates, **settings)
    return one


def run_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs, on the operator's backend for a CPU."""
    monkeypatch.setattr(kept_attention, "by_kernel", lambda kept: kept is not None and few(kept))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Scorer], list[int]]:
    """`launched(scorer)`: from now on, how many requests it scores launch by launch, by batch."""

    def watch(one: Scorer) -> list[int]:
        counts: list[int] = []
        candidates = one._candidates
        assert candidates is not None
        logits = candidates.logits

        def counted(requests: Sequence, states: Sequence) -> torch.Tensor:
            counts.append(len(requests))
            return logits(requests, states)

        monkeypatch.setattr(candidates, "logits", counted)
        return counts

    return watch


Launched = Callable[[Scorer], list[int]]


def until_captured(one: Scorer, asked: Sequence[Request]) -> list[Scores]:
    """Encoded, scored launch by launch, then captured."""
    for _ in range(2):
        for each in asked:
            one.score([each])
    forget_how_to_read_histories(one)
    return one.score(asked)


# At a history of 16, 32 and so on, and at 16 candidates, the room is the next larger one behind.
SHAPES = [(0, 3), (1, 1), (3, 5), (16, 16), (17, 17), (64, 9), (65, 33), (100, 20)]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("layer", [HSTULayer, MTGRLayer])
def test_scores_equal_those_of_the_model(
    layer: type[SequenceLayer], hook: str, launched: Launched
) -> None:
    model = ranker(layer, HOOKS[hook](), sem=hook == "recent")
    if hook == "frozen":
        model.attention_hook.freeze(torch.randn(ITEMS, DIM))  # type: ignore[union-attr]
    whole, kept = scorer(model, 0), capturing(model)
    asked = [request(user, *shape) for user, shape in enumerate(SHAPES)]
    until_captured(kept, asked)
    counts = launched(kept)
    for _ in range(2):
        same(kept.score(asked), whole.score(asked))
    assert sum(counts) == 0
    assert vars(kept.cache.counts) == {"hits": 4 * 8, "extended": 0, "misses": 8, "evicted": 0}


RARE = {"rare_items": RareItems, "item_counts": torch.arange(ITEMS)}
MODELS = {
    "no context": {"user_feature_sizes": None},
    "no bias": {"relative_bias": False},
    "no item features": {"item_feature_codes": None},
    "item bias and tasks": {"item_bias": True, "task_names": ["like", "share"]},
    "rare items": RARE,
    "one head": {"num_heads": 1},
    "relative positions": {
        "positional_encoder": TimeAwarePositionalEncoder(embedding_dim=DIM, form="relative")
    },
    "learned positions": {
        "positional_encoder": LearnedPositionalEncoder(embedding_dim=DIM, max_positions=100)
    },
}


@pytest.mark.parametrize("operator", [False, True], ids=["", "slot_attention"])
@pytest.mark.parametrize("hook", ["dense", "recent", "anchors only, before the gate", "no anchors"])
@pytest.mark.parametrize("model", MODELS)
def test_models(
    model: str, hook: str, operator: bool, monkeypatch: pytest.MonkeyPatch, launched: Launched
) -> None:
    if operator:
        run_the_operator(monkeypatch)
    settings = dict(MODELS[model])
    positions = settings.pop("positional_encoder", None)
    one = ranker(hook=HOOKS[hook](), **settings)
    if positions is not None:
        one.positional_encoder = positions
    whole, kept = scorer(one, 0), capturing(one)
    asked = [request(0, 90, 9), request(1, 40, 17), request(2, 0, 3)]
    until_captured(kept, asked)
    counts = launched(kept)
    answers, wanted = kept.score(asked), whole.score(asked)
    same(answers, wanted)
    for answer, expected in zip(answers, wanted, strict=True):
        assert set(answer.tasks) == set(one.task_names)
        for name, values in answer.tasks.items():
            np.testing.assert_allclose(values, expected.tasks[name], rtol=0, atol=1e-5)
    assert sum(counts) == 0


@pytest.mark.parametrize("hook", ["dense", "recent", "paper"])
def test_padding_is_not_read_and_nothing_waits(hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an earlier request left, or what was never written."""
    run_the_operator(monkeypatch)
    model = ranker(hook=HOOKS[hook]())
    kept = capturing(model)
    asked = request(0, 75, 5)
    kept.score([asked])
    kept.score([asked])
    state, encoded = kept.cache.get(("user", 0)), kept.encode(asked)
    candidates = kept._candidates
    assert state is not None
    assert state.ready is not None
    assert candidates is not None
    with torch.inference_mode():
        expected = candidates.logits([encoded], [state])
        sizes = Sizes.of(encoded, state)
        assert sizes.candidates > 5
        assert sizes.items > 75
        assert sizes.again or hook == "dense"
        padded = PaddedRequest(candidates, sizes, state.ready)
        padded._numbers.fill_(ITEMS - 1)
        padded._layers.fill_(torch.nan)
        padded._marks.fill_(5)
        padded._repeats.fill_(sizes.items - 1)
        if padded._rows is not None:
            padded._rows.fill_(1e6)
        padded.load(torch.from_numpy(padded.pack(encoded, state)), state.ready)
        with Waits() as waits:
            scores = padded.scores()
    assert waits.seen == []
    torch.testing.assert_close(scores[:-1, :5], expected, rtol=0, atol=1e-5)
    assert (scores[-1] == -torch.inf).all()


def test_a_longer_history_before_in_the_same_room(launched: Launched) -> None:
    model = ranker(hook=HOOKS["recent"]())
    whole, kept = scorer(model, 0), capturing(model)
    long, short = request(0, 96, 16), request(1, 81, 3)
    until_captured(kept, [long, short])
    counts = launched(kept)
    for asked in ([long], [short], [long, short, long], [short]):
        same(kept.score(asked), whole.score(asked))
    assert sum(counts) == 0
    assert kept.captured is not None
    assert len(kept.captured) == 1


@pytest.mark.parametrize(("spare", "falls_back"), [(8, False), (1, True)])
@pytest.mark.parametrize("repeats", [2, 5, 20])
def test_equal_items_are_chosen_as_in_training(
    repeats: int,
    spare: int,
    falls_back: bool,
    launched: Launched,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The most recent ones; where more are equal than were looked at, it is scored again."""
    monkeypatch.setitem(anchors._SPARE, "cpu", spare)
    model = ranker(hook=pgsa(top_k=3, sigma=0.5))
    whole, kept = scorer(model, 0), capturing(model)
    plain = request(1, 100, 20)
    items = np.arange(100) // repeats % ITEMS
    asked = request(0, 100, 20, history_items=items.tolist())
    until_captured(kept, [asked, plain])
    counts = launched(kept)
    same(kept.score([asked, plain]), whole.score([asked, plain]))
    assert bool(counts) == falls_back


def test_ties_of_padding_are_none(launched: Launched) -> None:
    """Item 0, which stands where there is no candidate, scores all items alike."""
    model = ranker(hook=pgsa(top_k=3))
    with torch.no_grad():
        model.item_table.weight[0] = 0.0  # type: ignore[union-attr]
    whole, kept = scorer(model, 0), capturing(model)
    asked = request(0, 100, 2, candidates=[7, 9])
    tied = request(1, 100, 2, candidates=[7, 0])
    until_captured(kept, [asked, tied])
    counts = launched(kept)
    same(kept.score([asked]), whole.score([asked]))
    assert counts == []
    same(kept.score([tied, asked]), whole.score([tied, asked]))
    assert counts == [1]


@pytest.mark.parametrize("hook", ["dense", "recent"])
def test_one_batch_of_every_kind(hook: str) -> None:
    model = ranker(hook=HOOKS[hook]())
    whole, kept = scorer(model, 0), capturing(model)
    until = [request(1, 30, 5), request(3, 80, 9)]
    kept.score([request(2, 20, 4)])
    for _ in range(2):
        kept.score(until)
    asked = [
        request(0, 20, 4),  # new
        request(3, 80, 9),
        request(1, 30, 2, candidates=[ITEMS, 3, 4]),
        request(2, 20, 40),  # a new size
        request(1, 31, 6),  # a new event
        request(3, 80, 5),
        request(0, 20, 2, candidates=[ITEMS]),
    ]
    for _ in range(3):
        same(kept.score(asked), whole.score(asked))


def test_the_least_recently_used_graph_goes(launched: Launched) -> None:
    model = ranker()
    whole, kept = scorer(model, 0), capturing(model, most_graphs=2)
    small, middle, large = (request(0, 50, count) for count in (5, 17, 33))
    until_captured(kept, [small, middle])
    kept.score([small])
    for _ in range(2):
        kept.score([large])
    counts = launched(kept)
    assert kept.captured is not None
    assert len(kept.captured) == 2
    assert [sizes.candidates for sizes in kept.captured._graphs] == [16, 48]
    for asked in (small, large, middle, small):
        same(kept.score([asked]), whole.score([asked]))
    assert counts == []


def test_the_metrics_count_graphs() -> None:
    pytest.importorskip("prometheus_client")
    from hpgr_plugin.serving.metrics import Metrics

    plain = scorer(ranker())
    assert Metrics(plain).registry.get_sample_value("hpgr_graphs") is None
    kept = capturing(ranker(), most_graphs=1)
    shown = Metrics(kept).registry.get_sample_value
    assert (shown("hpgr_graphs"), shown("hpgr_graph_requests_total")) == (0, 0)
    until_captured(kept, [request(0, 40, 9), request(1, 40, 90)])
    kept.score([request(1, 40, 90)])
    assert (shown("hpgr_graphs"), shown("hpgr_graph_requests_total")) == (1, 3)
    assert shown("hpgr_graph_bytes") == 0


def test_a_large_request_is_not_captured(
    monkeypatch: pytest.MonkeyPatch, launched: Launched
) -> None:
    compute_in_chunks(monkeypatch, 2000)
    model = ranker(hook=HOOKS["recent"]())
    whole, kept = scorer(model, 0), capturing(model)
    counts = launched(kept)
    asked = [request(0, 100, 20)]
    for _ in range(4):
        same(kept.score(asked), whole.score(asked))
    assert counts == [1, 1, 1]


def test_where_a_capture_fails_requests_are_scored_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(captured, "PaddedRequest", full)
    model = ranker()
    whole, kept = scorer(model, 0), capturing(model)
    with caplog.at_level(logging.WARNING):
        for count in (5, 20):
            for _ in range(4):
                same(kept.score([request(0, 50, count)]), whole.score([request(0, 50, count)]))
    assert [record.message for record in caplog.records] == [
        "no CUDA graph of some requests, which are scored launch by launch: CUDA out of memory."
    ]


# -- on a GPU -----------------------------------------------------------------------------------


def on_gpu(model: HSTURanker) -> tuple[Scorer, Scorer]:
    """Without graphs, and with them."""
    without, captures = scorer(model, device="cuda", capture=False), scorer(model, device="cuda")
    assert without.captured is None
    assert captures.captured is not None
    return without, captures


def near(actual: Sequence[Scores], expected: Sequence[Scores]) -> None:
    wanted = probabilities(expected)
    np.testing.assert_allclose(probabilities(actual), wanted, rtol=0, atol=1e-4)


@gpu
@pytest.mark.parametrize("relative_bias", [True, False])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("layer", [HSTULayer, MTGRLayer])
def test_graphs_score_as_launches_do(
    layer: type[SequenceLayer], hook: str, relative_bias: bool, launched: Launched
) -> None:
    model = ranker(layer, HOOKS[hook](), relative_bias=relative_bias)
    if hook == "frozen":
        model.attention_hook.freeze(torch.randn(ITEMS, DIM))  # type: ignore[union-attr]
    whole, (without, kept) = scorer(model, 0), on_gpu(model)
    asked = [request(user, *shape) for user, shape in enumerate(SHAPES)]
    wanted = whole.score(asked)
    until_captured(kept, asked)
    counts = launched(kept)
    for _ in range(3):
        near(kept.score(asked), wanted)
        near(without.score(asked), wanted)
        for each, expected in zip(reversed(asked), reversed(wanted), strict=True):
            near(kept.score([each]), [expected])
    assert sum(counts) == 0


@gpu
@pytest.mark.parametrize("hook", ["dense", "recent"])
def test_models_on_a_gpu(hook: str) -> None:
    for settings in (MODELS["no context"], MODELS["item bias and tasks"], RARE):
        model = ranker(hook=HOOKS[hook](), **settings)
        whole, (_, kept) = scorer(model, 0), on_gpu(model)
        asked = [request(0, 90, 9), request(1, 40, 17)]
        near(until_captured(kept, asked), whole.score(asked))


@gpu
@pytest.mark.parametrize("hook", ["dense", "recent"])
def test_after_eviction_of_histories_and_graphs(hook: str) -> None:
    model = ranker(hook=HOOKS[hook]())
    whole, (_, kept) = scorer(model, 0), on_gpu(model)
    assert kept.captured is not None
    kept.captured._most_graphs = 2
    asked = [request(user, length, 9) for user, length in ((0, 40), (1, 90), (2, 60), (3, 94))]
    wanted = whole.score(asked)
    for _ in range(3):
        for user, (each, expected) in enumerate(zip(asked, wanted, strict=True)):
            for _ in range(3):
                near(kept.score([each]), [expected])
            if user % 2:
                kept.cache.drop(("user", user))
                torch.cuda.empty_cache()
    near(kept.score(asked), wanted)
    assert len(kept.captured) == 2
    assert 0 < kept.captured.num_bytes <= torch.cuda.memory_reserved()


@gpu
def test_ties_on_a_gpu(launched: Launched) -> None:
    """Of repeated items in the graph; of a candidate for which all items are equal without it."""
    model = ranker(hook=pgsa(top_k=3, sigma=0.5))
    with torch.no_grad():
        model.item_table.weight[0] = 0.0  # type: ignore[union-attr]
    whole, (_, kept) = scorer(model, 0), on_gpu(model)
    items = 1 + np.arange(100) // 20
    asked = request(1, 100, 3, history_items=items.tolist(), candidates=[7, 8, 9])
    tied = request(2, 100, 2, candidates=[7, 0])
    until_captured(kept, [asked, tied])
    counts = launched(kept)
    near(kept.score([asked]), whole.score([asked]))
    assert counts == []
    near(kept.score([tied, asked]), whole.score([tied, asked]))
    assert counts == [1]


@gpu
@pytest.mark.parametrize("hook", ["dense", "recent"])
def test_a_batch_waits_for_the_device_once(hook: str) -> None:
    kept = on_gpu(ranker(hook=HOOKS[hook]()))[1]
    asked = [request(0, 90, 9), request(1, 40, 17), request(2, 91, 9)]
    until_captured(kept, asked)
    encoded = [kept.encode(each) for each in asked]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kept.score_encoded(encoded)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    assert len(waits) == 1, waits
