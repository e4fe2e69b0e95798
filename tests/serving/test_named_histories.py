"""Requests that name a kept history score as those that send it, or are told to send it."""

import numpy as np
import pytest
from small_models import HOOKS, ITEMS, ranker
from small_scorers import NOW, forget_how_to_read_histories, request, same, scorer

from hpgr_plugin.components.attention_hooks import PreferenceGuidedSparseAttention
from hpgr_plugin.hosts.embedded.model.hstu import HSTULayer, SequenceLayer
from hpgr_plugin.hosts.embedded.model.mtgr import MTGRLayer
from hpgr_plugin.serving import HistoryNotKeptError, Request, RequestError, Scorer, Scores


def named(asked: Request, version: str, **changes: object) -> Request:
    """The same request without its history."""
    nothing = dict.fromkeys(("history_items", "history_times", "history_actions"))
    return Request(**{**vars(asked), **nothing, "history_version": version, **changes})


def version_of(one: Scorer, asked: Request) -> str:
    """The version of a request's history, which is kept from now on."""
    return one.score([asked])[0].history_version


@pytest.mark.parametrize("length", [0, 1, 60])
@pytest.mark.parametrize("sem", [False, True], ids=["", "sem"])
@pytest.mark.parametrize("hook", ["dense", "recent", "cosine"])
@pytest.mark.parametrize("layer", [HSTULayer, MTGRLayer])
def test_scores_are_those_of_the_whole_request(
    layer: type[SequenceLayer], hook: str, sem: bool, length: int
) -> None:
    model = ranker(layer, HOOKS[hook](), sem=sem)
    whole, kept = scorer(model, 0), scorer(model)
    asked = request(0, length, 9)
    version = version_of(kept, request(0, length, 2))
    forget_how_to_read_histories(kept)
    for later in (0, 10**6):
        changes = {"times": NOW + later}
        wanted = whole.score([Request(**{**vars(asked), **changes})])
        answers = kept.score([named(asked, version, **changes)])
        same(answers, wanted)
        for name in ("history_length", "history_version", "unknown_candidates"):
            assert getattr(answers[0], name) == getattr(wanted[0], name)
    assert kept.cache.counts.hits == 2


def test_without_a_user_the_version_finds_the_history() -> None:
    model = ranker(hook=HOOKS["recent"]())
    whole, kept = scorer(model, 0), scorer(model)
    asked = request(0, 60, 9, user_id=None)
    same(kept.score([named(asked, version_of(kept, asked))]), whole.score([asked]))


def test_an_extended_history_has_a_version_of_its_own() -> None:
    model = ranker(hook=HOOKS["recent"]())
    whole, kept = scorer(model, 0), scorer(model)
    first, longer = request(0, 50, 6), request(0, 51, 6)
    old, new = version_of(kept, first), version_of(kept, longer)
    assert kept.cache.counts.extended == 1
    same(kept.score([named(longer, new)]), whole.score([longer]))
    with pytest.raises(HistoryNotKeptError):
        kept.score([named(first, old)])


def test_unknown_candidates_and_no_candidates() -> None:
    kept = scorer(ranker())
    asked = request(0, 20, 3)
    version = version_of(kept, asked)
    mixed, unknown, none = kept.score(
        [
            named(asked, version, candidates=[ITEMS, *asked.candidates]),
            named(asked, version, candidates=[ITEMS]),
            named(asked, version, candidates=[], times=NOW),
        ]
    )
    np.testing.assert_allclose(mixed.probabilities[1:], kept.score([asked])[0].probabilities)
    assert mixed.unknown_candidates == [0]
    assert np.isnan(unknown.probabilities).all()
    assert len(none.probabilities) == 0
    assert {answer.history_length for answer in (mixed, unknown, none)} == {20}


NOT_KEPT = {
    "another version": {"version": "0" * 24},
    "another user": {"user_id": 1},
    "no user": {"user_id": None},
    "another user feature": {"user_features": {"age": "3"}},
}


@pytest.mark.parametrize("case", [*NOT_KEPT, "evicted", "restarted", "cache off", "per candidate"])
def test_what_is_not_kept_has_to_be_sent(case: str) -> None:
    hook = HOOKS["recent"]()
    if case == "per candidate":
        hook = PreferenceGuidedSparseAttention(top_k=3, recent=4)
    kept = scorer(ranker(hook=hook), 0 if case == "cache off" else 64)
    asked = request(0, 40, 3)
    version = version_of(kept, asked)
    if case == "evicted":
        kept.cache.drop(("user", 0))
    if case == "restarted":
        kept.cache.clear()
    changes = {**NOT_KEPT.get(case, {})}
    version = changes.pop("version", version)
    with pytest.raises(HistoryNotKeptError, match="send the history") as raised:
        kept.score([named(asked, version, **changes)])
    assert raised.value.field == "history_version"


def test_a_history_that_only_some_candidates_saw_whole_is_not_kept_for_mtgr() -> None:
    kept = scorer(ranker(MTGRLayer))
    middle = request(0, 50, 1).history_times[20]  # type: ignore[index]
    several = request(0, 50, 3, times=[middle, NOW, NOW])
    with pytest.raises(HistoryNotKeptError):
        kept.score([named(several, version_of(kept, several), times=NOW)])


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("history_version", {"history_items": [1]}),
        ("history_version", {"history_times": []}),
        ("history_version", {"history_actions": [1]}),
        ("history_version", {"history_version": 7}),
        ("history.items", {"history_version": None}),
        ("history.times", {"history_version": None, "history_items": []}),
        ("times", {"times": [NOW, NOW + 1, NOW]}),
        ("times", {"times": 0}),
        ("candidates[1]", {"candidates": [1, "x", 3]}),
        ("user_features.height", {"user_features": {"height": 1}}),
    ],
)
def test_what_such_a_request_cannot_have_is_named(field: str, changes: dict) -> None:
    kept = scorer(ranker())
    asked = request(0, 40, 3)
    one = named(asked, version_of(kept, asked), **changes)
    with pytest.raises(RequestError) as raised:
        kept.score([one])
    assert raised.value.field == field
    assert not isinstance(raised.value, HistoryNotKeptError)


def test_a_time_at_the_last_event_is_refused() -> None:
    kept = scorer(ranker())
    asked = request(0, 40, 3)
    version, last = version_of(kept, asked), asked.history_times[-1]  # type: ignore[index]
    with pytest.raises(RequestError, match=f"after the last event .* {last}, got {last}"):
        kept.score([named(asked, version, times=last)])
    kept.score([named(asked, version, times=last + 1)])


@pytest.mark.parametrize("room", [True, False], ids=["", "little memory"])
def test_a_batch_is_scored_but_for_what_is_not_kept(room: bool) -> None:
    """Also where keeping one history drops another of the same batch."""
    model = ranker(hook=HOOKS["recent"]())
    whole, kept = scorer(model, 0), scorer(model)
    first, second, new = request(0, 50, 3), request(1, 50, 4), request(2, 50, 5)
    versions = [version_of(kept, one) for one in (first, second)]
    if not room:
        kept.cache.max_bytes = kept.cache.num_bytes
    batch = [
        new,
        named(first, versions[0]),
        named(first, versions[1]),
        second,
        named(second, versions[1], times=1),
        named(second, versions[1]),
    ]
    answers = kept.score_encoded([kept.encode(one) for one in batch])
    assert [type(answer) for answer in answers] == [
        Scores, Scores, HistoryNotKeptError, Scores, RequestError, Scores,
    ]  # fmt: skip
    scored = [answer for answer in answers if isinstance(answer, Scores)]
    same(scored, whole.score([new, first, second, second]))
