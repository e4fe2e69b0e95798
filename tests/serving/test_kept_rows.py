"""Plans at serving time are those of `plan_preferences`."""

import itertools

import pytest
import torch
from small_models import compute_in_chunks

from hpgr_plugin.components.attention_hooks import HookInputs
from hpgr_plugin.ops.preference_plan import plan_preferences
from hpgr_plugin.ops.preference_plan.plan import PlanSettings
from hpgr_plugin.serving import anchors
from hpgr_plugin.serving.kept_rows import plan_histories

SETTINGS = [
    PlanSettings(top_k=3, sigma=1.0, recent=4),
    PlanSettings(top_k=50, sigma=2.0),
    PlanSettings(top_k=1, sigma=0.1),
    PlanSettings(top_k=8, sigma=1.0, recent=32),
    PlanSettings(top_k=0, recent=3),
    PlanSettings(top_k=2, sigma=5.0, eps=0.5, recent=1),
]


def inputs(lengths: list[int], counts: list[int], *, items: int, timed: bool) -> HookInputs:
    table = torch.randint(-3, 4, (items, 8)).float()  # products without rounding: many ties
    history = torch.randint(0, items, (sum(lengths),))
    candidates = torch.randint(0, items, (sum(counts),))
    times = torch.cat(
        [torch.zeros(0).long(), *(torch.randint(0, 99, (n,)).sort().values for n in lengths)]
    )
    return HookInputs(
        history_embeddings=table[history],
        candidate_embeddings=table[candidates],
        history_offsets=torch.tensor([0, *lengths]).cumsum(0),
        candidate_offsets=torch.tensor([0, *counts]).cumsum(0),
        history_timestamps=times if timed else None,
        candidate_timestamps=torch.randint(0, 120, (sum(counts),)) if timed else None,
        history_ids=history,
        candidate_ids=candidates,
    )


@pytest.mark.parametrize("timed", [True, False], ids=["timed", "untimed"])
@pytest.mark.parametrize("items", [1, 2, 20, 1000])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_plans_equal(
    settings: PlanSettings, items: int, timed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs([40, 0, 1, 7, 120], [6, 2, 3, 0, 11], items=items, timed=timed)
    expected = plan_preferences(
        given.history_embeddings,
        given.candidate_embeddings,
        given.history_offsets,
        given.candidate_offsets,
        **settings._asdict(),
        history_timestamps=given.history_timestamps,
        candidate_timestamps=given.candidate_timestamps,
        backend="naive",
    )
    for chunk, spare in itertools.product((2**22, 200), (1, 8)):
        compute_in_chunks(monkeypatch, chunk)
        monkeypatch.setitem(anchors._SPARE, "cpu", spare)
        plan = plan_histories(given, settings).compact()
        assert torch.equal(plan.offsets, expected.offsets)
        assert torch.equal(plan.index, expected.index)
        torch.testing.assert_close(plan.weights, expected.weights.float())


def test_no_candidates() -> None:
    plan = plan_histories(inputs([3], [0], items=5, timed=True), PlanSettings()).compact()
    assert plan.offsets.tolist() == [0]
    assert len(plan.index) == 0
