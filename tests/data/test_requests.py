"""Requests, their histories and their batches against plain loops; no leak from the future."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch

from hpgr_plugin.data import (
    Batch,
    LastFractionSplit,
    PreparedData,
    RequestLoader,
    RequestSettings,
    build_requests,
)
from hpgr_plugin.data.build import build_log
from hpgr_plugin.data.events import EventTable, SideTable
from hpgr_plugin.data.log import SPLITS
from hpgr_plugin.errors import HpgrError


def prepared(seed: int, *, groups: bool = False) -> PreparedData:
    """A random log with ties, users of all sizes, history-only events and clicks as history."""
    random = np.random.default_rng(seed)
    size = 400
    user = random.geometric(0.08, size)
    events = EventTable(
        user=pa.array(user),
        item=pa.array(random.integers(0, 60, size)),
        timestamp=10**9 + random.integers(0, 300, size),
        values={},
        candidate=random.random(size) < 0.8,
        user_features=SideTable(
            pa.array(np.unique(user)), {"odd": pa.array([str(u % 2) for u in np.unique(user)])}
        ),
    )
    label = random.integers(0, 2, size).astype(np.int8)
    log, is_candidate = build_log(events, label=label, action=random.integers(0, 4, size))
    if groups:
        shown = log.event_users() * 1000 + (log.timestamp - 10**9) // 5
        log = dataclasses.replace(log, group=shown.astype(np.int64))
    split = LastFractionSplit(test=0.2, validation=0.1).assign(log, is_candidate)
    return PreparedData(log, split, (log.label == 1) | (random.random(size) < 0.3), is_candidate)


def naive_requests(
    data: PreparedData, split: str, settings: RequestSettings
) -> list[tuple[list[int], list[int]]]:
    """(candidate rows, history rows) of every request."""
    log, found = data.log, []
    for start, end in zip(log.user_offsets[:-1], log.user_offsets[1:], strict=True):
        mine = [
            row
            for row in range(start, end)
            if data.is_candidate[row] and SPLITS[data.split[row]] == split
        ]
        if split == "train" and settings.max_train_candidates_per_user is not None:
            mine = mine[-settings.max_train_candidates_per_user :]
        runs: list[list[int]] = []
        for row in mine:
            run = runs[-1] if runs else []
            fits = bool(run) and len(run) < settings.max_candidates
            if fits and settings.request_span_seconds is not None:
                fits = log.timestamp[row] - log.timestamp[run[0]] <= settings.request_span_seconds
            if fits and log.group is not None:
                fits = log.group[row] == log.group[run[-1]]
            if fits:
                run.append(row)
            else:
                runs.append([row])
        for run in runs:
            bound = log.timestamp[run[0] if settings.history == "request" else run[-1]]
            history = [
                row
                for row in range(start, end)
                if data.is_history[row] and log.timestamp[row] < bound
            ][-settings.max_history :]
            least = settings.min_history if split == "train" else settings.min_history_in_evaluation
            if len(history) >= least:
                found.append((run, history))
    return found


SETTINGS = {
    "default": RequestSettings(),
    "short": RequestSettings(max_history=3, max_candidates=2),
    "span": RequestSettings(request_span_seconds=20),
    "one second": RequestSettings(request_span_seconds=0, history="request"),
    "request": RequestSettings(history="request", max_candidates=5, min_history=0),
    "recent": RequestSettings(max_train_candidates_per_user=3, min_history_in_evaluation=4),
}


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_requests_match_a_loop(settings: RequestSettings, split: str, groups: bool) -> None:
    data = prepared(1, groups=groups)
    requests = build_requests(data, split, settings)
    expected = naive_requests(data, split, settings)
    assert len(requests) == len(expected)
    found = []
    for place in range(len(requests)):
        first, start = requests.candidate_start[place], requests.history_start[place]
        candidates = requests.candidate_rows[first : first + requests.candidate_count[place]]
        history = data.history_rows[start : start + requests.history_count[place]]
        found.append((candidates.tolist(), history.tolist()))
    assert found == expected


@pytest.mark.parametrize("history", ["candidate", "request"])
def test_a_batch_holds_nothing_from_the_future(history: str) -> None:
    data = prepared(2)
    settings = RequestSettings(history=history, max_candidates=4)
    for split in SPLITS:
        for batch in RequestLoader(prepared=data, split=split, settings=settings).batches():
            for b in range(batch.num_requests):
                past = batch.history_timestamps[slice(*batch.history_offsets[b : b + 2])]
                asked = batch.candidate_timestamps[slice(*batch.candidate_offsets[b : b + 2])]
                bound = asked[0] if history == "request" else asked[-1]
                assert (past < bound).all()
                assert (past.diff() >= 0).all()


def as_sets(batches: list[Batch]) -> list[tuple]:
    """Every request of the batches, as something to compare."""
    found = []
    for batch in batches:
        for b in range(batch.num_requests):
            h = slice(*batch.history_offsets[b : b + 2].tolist())
            c = slice(*batch.candidate_offsets[b : b + 2].tolist())
            found.append(
                (
                    int(batch.users[b]),
                    tuple(batch.candidate_items[c].tolist()),
                    tuple(batch.candidate_timestamps[c].tolist()),
                    tuple(batch.candidate_labels[c].tolist()),
                    tuple(batch.history_items[h].tolist()),
                    tuple(batch.history_actions[h].tolist()),
                    tuple(batch.history_timestamps[h].tolist()),
                    int(batch.user_features["odd"][b]),
                )
            )
    return sorted(found)


def naive_sets(data: PreparedData, split: str, settings: RequestSettings) -> list[tuple]:
    log, users = data.log, data.log.event_users()
    odd = log.user_features["odd"].codes
    return sorted(
        (
            int(users[run[0]]),
            *(tuple(column[run].tolist()) for column in (log.item, log.timestamp)),
            tuple(log.label[run].astype(float).tolist()),
            *(tuple(column[history].tolist()) for column in (log.item, log.action, log.timestamp)),
            int(odd[users[run[0]]]),
        )
        for run, history in naive_requests(data, split, settings)
    )


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("split", SPLITS)
def test_batches_hold_every_request_once(split: str, prefetch: int) -> None:
    data, settings = prepared(3), RequestSettings(max_candidates=3)
    loader = RequestLoader(
        prepared=data, split=split, settings=settings, batch_tokens=60, prefetch=prefetch
    )
    batches = list(loader.batches(epoch=1))
    assert len(batches) == loader.num_batches(1) > 1
    assert as_sets(batches) == naive_sets(data, split, settings)
    for batch in batches:
        assert batch.history_offsets.dtype == batch.history_items.dtype == torch.int64
        assert batch.candidate_labels.dtype == torch.float32
        tokens = batch.history_items.numel() + batch.num_candidates
        assert tokens <= 60 or batch.num_requests == 1


def equal(first: Batch, second: Batch) -> bool:
    same = zip(dataclasses.astuple(first)[:-3], dataclasses.astuple(second)[:-3], strict=True)
    return all(torch.equal(a, b) for a, b in same)


def test_epochs_repeat_differ_and_resume() -> None:
    loader = RequestLoader(
        prepared=prepared(4), split="train", settings=RequestSettings(), batch_tokens=80
    )
    first, again = list(loader.batches(epoch=0)), list(loader.batches(epoch=0))
    assert len(first) > 3
    assert all(map(equal, first, again))
    assert not all(map(equal, first, loader.batches(epoch=1)))
    resumed = list(loader.batches(epoch=0, start=2))
    assert len(resumed) == len(first) - 2
    assert all(map(equal, first[2:], resumed))


def test_stopping_early_leaves_no_thread_behind() -> None:
    import threading

    loader = RequestLoader(
        prepared=prepared(4), split="train", settings=RequestSettings(), batch_tokens=80
    )
    before = threading.active_count()
    batches = loader.batches()
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_ranks_share_the_epoch() -> None:
    data = prepared(5)

    def loaders(split: str, ranks: int) -> list[RequestLoader]:
        return [
            RequestLoader(
                prepared=data,
                split=split,
                settings=RequestSettings(),
                batch_tokens=70,
                rank=rank,
                world_size=ranks,
            )
            for rank in range(ranks)
        ]

    whole = as_sets(list(loaders("train", 1)[0].batches()))
    shares = [list(loader.batches()) for loader in loaders("train", 3)]
    assert len({len(share) for share in shares}) == 1
    together = as_sets([batch for share in shares for batch in share])
    assert set(together) <= set(whole)
    assert len(together) == len(set(together))
    # Evaluation leaves nobody out.
    whole = as_sets(list(loaders("test", 1)[0].batches()))
    shares = [list(loader.batches()) for loader in loaders("test", 3)]
    assert as_sets([batch for share in shares for batch in share]) == whole
    with pytest.raises(ValueError, match="world_size=500"):
        loaders("train", 500)[0].num_batches()


def test_lengths_inside_a_batch_are_alike() -> None:
    loader = RequestLoader(
        prepared=prepared(6),
        split="train",
        settings=RequestSettings(max_candidates=1),
        batch_tokens=300,
    )

    def padding(batches: list[torch.Tensor]) -> float:
        """The share of a padded tensor that would be padding."""
        padded = sum(int(lengths.max()) * len(lengths) for lengths in batches)
        return 1 - sum(int(lengths.sum()) for lengths in batches) / padded

    batches = [batch.history_offsets.diff() for batch in loader.batches()]
    everything = torch.cat(batches)
    mixed = everything[torch.randperm(len(everything))].split([len(b) for b in batches])
    assert padding(batches) < 0.6 * padding(list(mixed))


def test_train_fraction_draws_requests_by_seed() -> None:
    data = prepared(7)

    def draw(seed: int, split: str = "train") -> list[int]:
        settings = RequestSettings(train_fraction=0.5, seed=seed, max_candidates=2)
        return build_requests(data, split, settings).candidate_start.tolist()

    whole = build_requests(data, "train", RequestSettings(max_candidates=2))
    assert 0.3 < len(draw(0)) / len(whole) < 0.7
    assert draw(0) == draw(0) != draw(1)
    assert draw(0, "test") == draw(1, "test")


def test_an_empty_split_has_no_batches() -> None:
    data = prepared(8)
    data = dataclasses.replace(data, split=np.zeros_like(data.split))
    loader = RequestLoader(prepared=data, split="test", settings=RequestSettings())
    assert len(loader.requests) == loader.num_batches() == 0
    assert list(loader.batches()) == []


def test_to_moves_everything() -> None:
    batch = next(
        iter(
            RequestLoader(prepared=prepared(9), split="test", settings=RequestSettings()).batches()
        )
    )
    moved = batch.to("meta")
    assert moved.history_items.is_meta
    assert moved.user_features["odd"].is_meta


@pytest.mark.parametrize(
    "wrong",
    [
        {"history": "all"},
        {"max_history": 0},
        {"max_candidates": 0},
        {"request_span_seconds": -1},
        {"train_fraction": 0.0},
        {"max_train_candidates_per_user": 0},
        {"seed": -1},
    ],
)
def test_settings_are_checked(wrong: dict) -> None:
    with pytest.raises(HpgrError, match=rf"hpgr\.RequestSettings\.{next(iter(wrong))} takes"):
        RequestSettings(**wrong)
    with pytest.raises(ValueError, match="'dev'"):
        build_requests(prepared(0), "dev", RequestSettings())
