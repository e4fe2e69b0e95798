"""Random items: how many are kept, how evenly, and that a draw repeats."""

import pytest
import torch

from hpgr_plugin.components.attention_hooks import HookInputs
from hpgr_plugin.components.random_items import RandomItems
from hpgr_plugin.errors import HpgrError

OFFSETS, CANDIDATE_OFFSETS = torch.tensor([0, 20, 20, 23]), torch.tensor([0, 3, 4, 6])
TIMES, CANDIDATE_TIMES = torch.arange(23), torch.tensor([10, 2, 100, 5, 22, 20])
IDS, CANDIDATE_IDS = torch.arange(23) % 7, torch.tensor([1, 2, 3, 4, 5, 1])


def inputs(**changes: object) -> HookInputs:
    given = {
        "history_embeddings": torch.zeros(23, 2),
        "candidate_embeddings": torch.zeros(6, 2),
        "history_offsets": OFFSETS,
        "candidate_offsets": CANDIDATE_OFFSETS,
        "history_timestamps": TIMES,
        "candidate_timestamps": CANDIDATE_TIMES,
        "history_ids": IDS,
        "candidate_ids": CANDIDATE_IDS,
    }
    return HookInputs(**{**given, **changes})


def rows(plan) -> list[list[int]]:
    return [part.tolist() for part in plan.index.split(plan.offsets.diff().tolist())]


def test_some_of_what_is_visible_in_order() -> None:
    plan = RandomItems(keep=4).plan(inputs())
    assert plan.offsets.diff().tolist() == [4, 2, 4, 0, 2, 0]
    for row, (first, last) in zip(
        rows(plan), [(0, 10), (0, 2), (0, 20), (0, 0), (20, 22), (20, 20)], strict=True
    ):
        assert row == sorted(set(row))
        assert all(first <= i < last for i in row)
    assert torch.equal(plan.weights, torch.ones(len(plan.index)))


def test_a_draw_repeats_and_depends_on_the_seed() -> None:
    first = rows(RandomItems(keep=4).plan(inputs()))
    assert rows(RandomItems(keep=4).eval().plan(inputs())) == first
    assert rows(RandomItems(keep=4, seed=1).plan(inputs())) != first
    another = CANDIDATE_IDS.clone()
    another[1] = 6
    others = rows(RandomItems(keep=4).plan(inputs(candidate_ids=another)))
    assert [others[i] for i in (0, 2, 4)] == [first[i] for i in (0, 2, 4)]


def test_every_place_is_drawn_alike() -> None:
    count, length = 3000, 20
    many = inputs(
        candidate_embeddings=torch.zeros(count, 2),
        history_embeddings=torch.zeros(length, 2),
        history_offsets=torch.tensor([0, length]),
        candidate_offsets=torch.tensor([0, count]),
        history_timestamps=None,
        candidate_timestamps=None,
        history_ids=torch.arange(length) % 3,
        candidate_ids=torch.arange(count),
    )
    plan = RandomItems(keep=5).plan(many)
    share = plan.index.bincount(minlength=length) / count
    assert (share - 0.25).abs().max() < 0.04


def test_arguments() -> None:
    with pytest.raises(ValueError, match="keep must be at least 1"):
        RandomItems(keep=0)
    with pytest.raises(HpgrError, match="needs history_ids"):
        RandomItems(keep=1).plan(inputs(history_ids=None))
