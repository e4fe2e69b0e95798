"""The attention hooks: what they pass on, what they refuse, and stochastic length's statistics."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from hpgr_plugin.components import naive as naive_components
from hpgr_plugin.components.attention_hooks import (
    AttentionHook,
    HookInputs,
    PreferenceGuidedSparseAttention,
    StochasticLength,
)
from hpgr_plugin.ops.preference_plan import plan_preferences


@pytest.fixture
def table():
    return torch.randn(15, 4)


@pytest.fixture
def inputs(table, offsets_of, sorted_times):
    lengths, counts = [12, 0, 7, 1], [2, 1, 3, 1]
    history_ids, candidate_ids = torch.randint(0, 15, (20,)), torch.randint(0, 15, (7,))
    return HookInputs(
        history_embeddings=table[history_ids],
        candidate_embeddings=table[candidate_ids],
        history_offsets=offsets_of(lengths),
        candidate_offsets=offsets_of(counts),
        history_timestamps=sorted_times(lengths, 30),
        candidate_timestamps=torch.randint(10, 40, (7,)),
        history_ids=history_ids,
        candidate_ids=candidate_ids,
    )


def user_inputs(offsets, times=None):
    total, users = int(offsets[-1]), len(offsets) - 1
    no_candidates = torch.zeros(users + 1, dtype=torch.int64)
    return HookInputs(
        torch.zeros(total, 2), torch.zeros(0, 2), offsets, no_candidates, history_timestamps=times
    )


def assert_plans_equal(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


class TestPreferenceGuidedSparseAttention:
    def test_plans_with_its_settings(self, inputs):
        hook = PreferenceGuidedSparseAttention(top_k=2, sigma=0.6, eps=0.1, recent=1)
        got = hook.plan(inputs)
        want = plan_preferences(
            inputs.history_embeddings,
            inputs.candidate_embeddings,
            inputs.history_offsets,
            inputs.candidate_offsets,
            top_k=2,
            sigma=0.6,
            eps=0.1,
            recent=1,
            history_timestamps=inputs.history_timestamps,
            candidate_timestamps=inputs.candidate_timestamps,
        )
        assert_plans_equal(got, want)
        assert (hook.layout, hook.mask_position) == ("per_candidate", "post")

    def test_eval_plans_as_training_does(self, inputs):
        hook = PreferenceGuidedSparseAttention(top_k=2)
        assert_plans_equal(hook.plan(inputs), hook.eval().plan(inputs))

    def test_a_frozen_table_does_not_follow_the_live_one(self, inputs, table):
        hook = PreferenceGuidedSparseAttention(top_k=2, sigma=0.6, table="frozen")
        with pytest.raises(ValueError, match="needs freeze"):
            hook.plan(inputs)
        hook.freeze(table)
        want = PreferenceGuidedSparseAttention(top_k=2, sigma=0.6).plan(inputs)
        table.neg_()[0] = 0.0
        inputs = replace(inputs, candidate_embeddings=-inputs.candidate_embeddings)
        assert_plans_equal(hook.plan(inputs), want)
        with pytest.raises(ValueError, match="needs history_ids and candidate_ids"):
            hook.plan(replace(inputs, history_ids=None))

    @pytest.mark.parametrize("table_kind", ["live", "frozen"])
    def test_a_cosine_score_ignores_norms(self, inputs, table, table_kind):
        """Scaling the rows of the table changes the dot product's anchors, not the cosine's."""
        scale = torch.logspace(-1, 1, len(table)).unsqueeze(1)
        scaled = replace(
            inputs,
            history_embeddings=(table * scale)[inputs.history_ids],
            candidate_embeddings=(table * scale)[inputs.candidate_ids],
        )
        plans = {}
        for score in ("dot", "cosine"):
            for name, given in (("plain", inputs), ("scaled", scaled)):
                hook = PreferenceGuidedSparseAttention(
                    top_k=2, sigma=0.6, score=score, table=table_kind
                )
                if table_kind == "frozen":
                    hook.freeze(table * scale if name == "scaled" else table)
                plans[score, name] = hook.plan(given)
        assert_plans_equal(plans["cosine", "plain"], plans["cosine", "scaled"])
        assert not torch.equal(plans["dot", "plain"].index, plans["dot", "scaled"].index)

    def test_a_cosine_score_equals_the_dot_product_of_unit_rows(self, inputs):
        want = PreferenceGuidedSparseAttention(top_k=2, sigma=0.6).plan(
            replace(
                inputs,
                history_embeddings=torch.nn.functional.normalize(inputs.history_embeddings),
                candidate_embeddings=torch.nn.functional.normalize(inputs.candidate_embeddings),
            )
        )
        hook = PreferenceGuidedSparseAttention(top_k=2, sigma=0.6, score="cosine")
        assert_plans_equal(hook.plan(inputs), want)

    def test_a_frozen_table_travels_in_the_state(self, table):
        hook = PreferenceGuidedSparseAttention(table="frozen")
        hook.freeze(table)
        fresh = nn.ModuleDict({"hook": PreferenceGuidedSparseAttention(table="frozen")})
        fresh.load_state_dict(nn.ModuleDict({"hook": hook}).state_dict())
        assert torch.equal(fresh["hook"].frozen_table, table)
        assert not list(fresh.parameters())

    def test_freeze_needs_a_frozen_hook(self):
        with pytest.raises(ValueError, match="this hook has table='live'"):
            PreferenceGuidedSparseAttention().freeze(torch.zeros(3, 2))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"top_k": -1}, "top_k must be"),
            ({"sigma": -1.0}, "sigma must be"),
            ({"eps": 2.0}, "eps must be"),
            ({"recent": -1}, "recent must be"),
            ({"top_k": 0}, "top_k and recent are both 0"),
            (
                {"layout": "per_user"},
                "layout must be one of auto, per_candidate, shared_history, got",
            ),
            ({"mask_position": "both"}, "mask_position must be one of post, pre, got 'both'"),
            ({"table": "cold"}, "table must be one of live, frozen, got 'cold'"),
            ({"score": "norm"}, "score must be one of dot, cosine, got 'norm'"),
        ],
        ids=str,
    )
    def test_settings_out_of_range(self, settings, message):
        with pytest.raises(ValueError, match=message):
            PreferenceGuidedSparseAttention(**settings)


class TestStochasticLength:
    def test_training_only(self, offsets_of):
        hook = StochasticLength(alpha=1.5, selection="recent", max_history=16)
        inputs = user_inputs(offsets_of([40]))
        assert hook.plan(inputs) is not None
        assert hook.eval().plan(inputs) is None

    @pytest.mark.parametrize("selection", ["weighted", "recent", "uniform"])
    def test_what_is_kept(self, offsets_of, lengths, sorted_times, selection):
        offsets, times = offsets_of(lengths), sorted_times(lengths, 50)
        hook = StochasticLength(alpha=1.5, selection=selection, max_history=16)
        for _ in range(5):
            plan = hook.plan(user_inputs(offsets, times))
            assert plan.offsets.shape == offsets.shape
            assert torch.equal(plan.weights, torch.ones(len(plan.index)))
            for b, length in enumerate(lengths):
                row = plan.index[plan.offsets[b] : plan.offsets[b + 1]] - offsets[b]
                assert len(row) in ({length} if length <= 8 else {8, length})
                assert row.tolist() == sorted(set(row.tolist()))
                assert all(0 <= place < length for place in row.tolist())

    def test_recent_keeps_the_last(self, offsets_of):
        hook = StochasticLength(alpha=1.5, selection="recent", max_history=16)
        offsets = offsets_of([4, 10**4])
        plan = hook.plan(user_inputs(offsets))
        assert plan.index.tolist() == [*range(4), *range(9996, 10004)]
        assert plan.offsets.tolist() == [0, 4, 12]

    @pytest.mark.parametrize("length", [9, 12, 16, 30])
    def test_how_often_a_history_stays_whole(self, offsets_of, length):
        hook = StochasticLength(alpha=1.5, selection="recent", max_history=16, seed=3)
        users = 20000
        plan = hook.plan(user_inputs(offsets_of([length] * users)))
        kept, probability = naive_components.stochastic_length(length, 16, 1.5)
        counts = plan.offsets.diff()
        assert set(counts.tolist()) == {kept, length}
        frequency = float((counts == length).double().mean())
        assert abs(frequency - probability) < 4 * (probability * (1 - probability) / users) ** 0.5

    def test_the_bound_may_come_from_the_batch(self, offsets_of):
        hook = StochasticLength(alpha=1.5, selection="recent")
        plan = hook.plan(user_inputs(offsets_of([16] + [12] * 300)))
        assert set(plan.offsets.diff()[1:].tolist()) == {8, 12}

    def test_alpha_two_keeps_everything_within_the_bound(self, offsets_of):
        hook = StochasticLength(alpha=2.0, selection="recent", max_history=20)
        plan = hook.plan(user_inputs(offsets_of([20] * 50)))
        assert plan.index.tolist() == list(range(1000))

    def test_a_whole_power_is_kept_whole(self, offsets_of):
        hook = StochasticLength(alpha=4 / 3, selection="recent", max_history=64)
        plan = hook.plan(user_inputs(offsets_of([64] * 200)))
        assert set(plan.offsets.diff().tolist()) == {16, 64}

    def test_uniform_selection(self, offsets_of):
        hook = StochasticLength(alpha=1.5, selection="uniform", max_history=16)
        users, length = 4000, 64
        plan = hook.plan(user_inputs(offsets_of([length] * users)))
        short = (plan.offsets.diff() == 8).repeat_interleave(plan.offsets.diff())
        counts = torch.bincount(plan.index[short] % length, minlength=length).double()
        expected = counts.sum() / length
        assert float(((counts - expected) ** 2 / expected).sum()) < 110  # chi2, 63 degrees

    def test_weighted_selection(self, offsets_of):
        # One draw of a history of three: N_c = 2, floor(2^(1.5 / 2)) = 1 item is kept.
        hook = StochasticLength(alpha=1.5, selection="weighted", max_history=2)
        users = 40000
        times = torch.tensor([0, 60, 100]).repeat(users)
        plan = hook.plan(user_inputs(offsets_of([3] * users), times))
        short = (plan.offsets.diff() == 1).repeat_interleave(plan.offsets.diff())
        counts = torch.bincount(plan.index[short] % 3, minlength=3).double()
        # Ages 100, 40, 0 of a sum of 140: weights 40, 100, 140 over 140, which add up to 2.
        want = torch.tensor([40.0, 100.0, 140.0], dtype=torch.float64) / 280.0
        assert float((counts / counts.sum() - want).abs().max()) < 0.012

    def test_weighted_selection_where_nothing_has_aged(self, offsets_of):
        hook = StochasticLength(alpha=1.5, selection="weighted", max_history=16)
        plan = hook.plan(user_inputs(offsets_of([100]), torch.full((100,), 7)))
        assert len(plan.index) in (8, 100)

    def test_draws_repeat_for_a_seed_and_go_on_after_a_resume(self, offsets_of):
        inputs = user_inputs(offsets_of([30] * 20))

        def draws(hook, n):
            torch.rand(3)  # other draws in between
            return [hook.plan(inputs).index for _ in range(n)]

        first = StochasticLength(alpha=1.5, selection="uniform", max_history=16, seed=1)
        want = draws(first, 4)
        again = StochasticLength(alpha=1.5, selection="uniform", max_history=16, seed=1)
        assert all(torch.equal(a, b) for a, b in zip(draws(again, 2), want[:2], strict=True))
        resumed = StochasticLength(alpha=1.5, selection="uniform", max_history=16, seed=9)
        assert not torch.equal(draws(resumed, 1)[0], want[0])
        resumed.load_state_dict(again.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(draws(resumed, 2), want[2:], strict=True))

    def test_weighted_needs_times(self, offsets_of):
        hook = StochasticLength(alpha=1.5)
        with pytest.raises(ValueError, match="needs history_timestamps, got None"):
            hook.plan(user_inputs(offsets_of([30])))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"alpha": 1.0}, r"alpha must be in \(1, 2\], got 1.0"),
            ({"alpha": 2.5}, r"alpha must be in \(1, 2\], got 2.5"),
            ({"alpha": 1.5, "selection": "old"}, "selection must be one of weighted, recent"),
            ({"alpha": 1.5, "max_history": 0}, "max_history must be at least 1, got 0"),
        ],
        ids=str,
    )
    def test_settings_out_of_range(self, settings, message):
        with pytest.raises(ValueError, match=message):
            StochasticLength(**settings)


@pytest.mark.parametrize(
    ("hook", "layout"),
    [
        (
            PreferenceGuidedSparseAttention(layout="shared_history", mask_position="pre"),
            "shared_history",
        ),
        (StochasticLength(alpha=1.6), "per_user"),
    ],
    ids=["pgsa", "stochastic-length"],
)
def test_one_interface(hook, layout):
    assert isinstance(hook, AttentionHook)
    assert hook.layout == layout
    assert hook.mask_position == ("pre" if layout == "shared_history" else "post")
    # Hosts initialise weights with Module.apply: no attribute of a hook may replace it.
    nn.Sequential(hook).apply(lambda module: None)


class TestAutomaticLayout:
    """layout="auto": chosen by bounds once, then kept."""

    few_kept: ClassVar = {"top_k": 8, "sigma": 1.0, "recent": 32}  # 104 items at most

    @pytest.mark.parametrize(
        ("max_history", "max_candidates", "layout"),
        [
            (4096, 1, "per_candidate"),
            (4096, 10, "per_candidate"),
            (4096, 64, "shared_history"),
            (1024, 64, "shared_history"),
            (16384, 64, "per_candidate"),
            (16384, 512, "shared_history"),
            (400, 16, "shared_history"),
        ],
    )
    def test_the_cheaper_layout_is_chosen(
        self, max_history: int, max_candidates: int, layout: str
    ) -> None:
        hook = PreferenceGuidedSparseAttention(**self.few_kept)
        assert hook.layout == "per_candidate"  # until a host decides
        sizes = {"max_history": max_history, "max_candidates": max_candidates}
        hook.decide_layout(**sizes)
        assert hook.layout == layout

    def test_a_second_decision_changes_nothing(self) -> None:
        hook = PreferenceGuidedSparseAttention(**self.few_kept)
        hook.decide_layout(max_history=4096, max_candidates=64)
        hook.decide_layout(max_history=4096, max_candidates=1)
        assert hook.layout == "shared_history"

    def test_a_bound_layout_stays(self) -> None:
        hook = PreferenceGuidedSparseAttention(**self.few_kept, layout="shared_history")
        hook.decide_layout(max_history=4096, max_candidates=1)
        assert hook.layout == "shared_history"
        assert hook.state_dict() == {}

    def test_a_checkpoint_restores_the_choice(self) -> None:
        trained, resumed = (PreferenceGuidedSparseAttention(**self.few_kept) for _ in range(2))
        trained.decide_layout(max_history=400, max_candidates=16)
        resumed.decide_layout(max_history=400, max_candidates=1)
        assert resumed.layout == "per_candidate"
        resumed.load_state_dict(trained.state_dict())
        assert resumed.layout == "shared_history"

    def test_a_bound_layout_takes_a_checkpoint_with_a_choice(self) -> None:
        trained = PreferenceGuidedSparseAttention(**self.few_kept)
        trained.decide_layout(max_history=400, max_candidates=16)
        bound = PreferenceGuidedSparseAttention(**self.few_kept, layout="per_candidate")
        bound.load_state_dict(trained.state_dict())
        assert bound.layout == "per_candidate"

    def test_a_checkpoint_without_a_choice_was_trained_per_candidate(self) -> None:
        resumed = PreferenceGuidedSparseAttention(**self.few_kept)
        resumed.decide_layout(max_history=400, max_candidates=16)
        resumed.load_state_dict({})
        assert resumed.layout == "per_candidate"

    def test_the_choice_is_said_once(self, caplog: pytest.LogCaptureFixture) -> None:
        hook = PreferenceGuidedSparseAttention(**self.few_kept)
        with caplog.at_level("INFO"):
            for _ in range(2):
                hook.decide_layout(max_history=400, max_candidates=16)
        (record,) = caplog.records
        assert "'shared_history'" in record.getMessage()
