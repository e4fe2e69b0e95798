"""plan_preferences against the loops of naive.py, and what a plan promises."""

import math

import pytest
import torch

from hpgr_plugin.ops.preference_plan import PlanInputs, PlanSettings, plan_preferences
from hpgr_plugin.ops.preference_plan import naive as naive_plan
from hpgr_plugin.ops.preference_plan import torch as plan_module
from hpgr_plugin.ops.preference_plan.plan import gaussian_kernel

SETTINGS = [
    {"top_k": 3},
    {"top_k": 1, "sigma": 0.3},
    {"top_k": 2, "sigma": 1.0, "recent": 4},
    {"top_k": 0, "recent": 2},
    {"top_k": 0},
    {"top_k": 2, "sigma": 50.0},
    {"top_k": 2, "sigma": 1.0, "eps": 1.0},
    {"top_k": 100, "recent": 100},
]


def candidate_counts(lengths):
    return [(0, 1, 3)[b % 3] for b in range(1, len(lengths) + 1)]


def loops(inputs, **settings):
    return naive_plan.plan_preferences(PlanInputs(**inputs), PlanSettings(**settings))


def assert_plans_equal(got, want):
    assert torch.equal(got.index, want.index)
    assert torch.equal(got.offsets, want.offsets)
    assert got.weights.dtype == want.weights.dtype
    torch.testing.assert_close(got.weights, want.weights, rtol=1e-6, atol=0)


@pytest.fixture
def make_inputs(offsets_of, sorted_times):
    def build(lengths, *, ties=False, timed=False, dtype=torch.float64, dim=4):
        counts = candidate_counts(lengths)
        draw = (
            (lambda n: torch.randint(-1, 2, (n, dim))) if ties else (lambda n: torch.randn(n, dim))
        )
        inputs = {
            "history_embeddings": draw(sum(lengths)).to(dtype),
            "candidate_embeddings": draw(sum(counts)).to(dtype),
            "history_offsets": offsets_of(lengths),
            "candidate_offsets": offsets_of(counts),
        }
        if timed:
            inputs["history_timestamps"] = sorted_times(lengths, 20)
            inputs["candidate_timestamps"] = torch.randint(0, 25, (sum(counts),))
        return inputs

    return build


@pytest.mark.parametrize("timed", [False, True], ids=["all-visible", "timed"])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equals_the_loops(make_inputs, lengths, settings, ties, timed):
    inputs = make_inputs(lengths, ties=ties, timed=timed)
    assert_plans_equal(plan_preferences(**inputs, **settings), loops(inputs, **settings))


def test_int32_offsets_and_half_precision(make_inputs):
    inputs = make_inputs([30, 0, 12], ties=True, timed=True, dtype=torch.bfloat16)
    want = loops(inputs, top_k=4, recent=2)
    for name in ("history_offsets", "candidate_offsets"):
        inputs[name] = inputs[name].int()
    got = plan_preferences(**inputs, top_k=4, recent=2)
    assert got.weights.dtype == torch.float32
    assert got.offsets.dtype == got.index.dtype == torch.int64
    assert_plans_equal(got, want)


def test_the_longest_history(make_inputs):
    inputs = make_inputs([3, 16384])
    settings = {"top_k": 4, "sigma": 2.0, "recent": 16}
    got = plan_preferences(**inputs, **settings)
    assert_plans_equal(got, loops(inputs, **settings))
    assert int(got.offsets.diff().max()) <= 4 * 15 + 16


def test_equal_scores_go_to_the_most_recent(offsets_of):
    history = torch.ones(10, 3)
    got = plan_preferences(
        history, torch.ones(1, 3), offsets_of([10]), offsets_of([1]), top_k=3, sigma=0.1
    )
    assert got.index.tolist() == [7, 8, 9]
    # An item that comes twice scores the same twice, whatever the arithmetic.
    items = torch.randn(500, 67)
    twice = torch.cat([items, items])
    candidate = torch.randn(1, 67)
    got = plan_preferences(
        twice, candidate, offsets_of([1000]), offsets_of([1]), top_k=1, sigma=0.1
    )
    assert got.index.tolist() == [500 + int((items @ candidate[0]).argmax())]


def test_fewer_items_than_anchors_keeps_all_whole(offsets_of):
    got = plan_preferences(
        torch.randn(6, 2), torch.randn(1, 2), offsets_of([6]), offsets_of([1]), top_k=50
    )
    assert got.index.tolist() == list(range(6))
    assert torch.equal(got.weights, torch.ones(6))


def test_the_gaussian_around_one_anchor(offsets_of):
    history = torch.zeros(30, 1)
    history[12] = 1.0
    got = plan_preferences(
        history, torch.ones(1, 1), offsets_of([30]), offsets_of([1]), top_k=1, sigma=2.0, eps=1e-3
    )
    # A radius of 3.7 sigma: 7 positions to each side.
    assert got.index.tolist() == list(range(5, 20))
    want = [math.exp(-((j - 12) ** 2) / 8.0) for j in range(5, 20)]
    torch.testing.assert_close(got.weights, torch.tensor(want))


def test_recent_items_spread_no_gaussian(offsets_of):
    history = torch.zeros(20, 1)
    history[2] = 1.0
    got = plan_preferences(
        history, torch.ones(1, 1), offsets_of([20]), offsets_of([1]), top_k=1, sigma=0.5, recent=3
    )
    assert got.index.tolist() == [1, 2, 3, 17, 18, 19]
    assert got.weights[[1, 3, 4, 5]].tolist() == [1.0] * 4


def test_hidden_items_do_not_matter(offsets_of):
    times = torch.tensor([1, 2, 3, 3, 4, 9])
    history, candidate = torch.randn(6, 2), torch.randn(1, 2)
    arguments = (offsets_of([6]), offsets_of([1]))
    settings = {
        "top_k": 1,
        "recent": 1,
        "history_timestamps": times,
        "candidate_timestamps": torch.tensor([3]),
    }
    before = plan_preferences(history, candidate, *arguments, **settings)
    assert int(before.index.max()) == 1  # t_i = t_C is the future: the most recent item is 1
    history[2:] = 100.0 * candidate
    after = plan_preferences(history, candidate, *arguments, **settings)
    assert torch.equal(before.index, after.index)
    assert torch.equal(before.weights, after.weights)


def test_a_plan_depends_only_on_its_own_user(make_inputs, offsets_of):
    lengths = [40, 0, 33, 7, 21, 90]
    inputs = make_inputs(lengths, timed=True, dtype=torch.float32, dim=33)
    counts = candidate_counts(lengths)
    whole = plan_preferences(**inputs, top_k=5, recent=2)
    for b in range(len(lengths)):
        items = slice(*inputs["history_offsets"][b : b + 2].tolist())
        rows = range(*inputs["candidate_offsets"][b : b + 2].tolist())
        candidates = slice(rows.start, rows.stop)
        single = plan_preferences(
            inputs["history_embeddings"][items],
            inputs["candidate_embeddings"][candidates],
            offsets_of([lengths[b]]),
            offsets_of([counts[b]]),
            top_k=5,
            recent=2,
            history_timestamps=inputs["history_timestamps"][items],
            candidate_timestamps=inputs["candidate_timestamps"][candidates],
        )
        kept = slice(int(whole.offsets[rows.start]), int(whole.offsets[rows.stop]))
        assert torch.equal(single.index + items.start, whole.index[kept])
        assert torch.equal(single.weights, whole.weights[kept])


@pytest.mark.parametrize("elements", [1, 3000])
def test_chunks_change_nothing(make_inputs, monkeypatch, elements):
    inputs = make_inputs([20, 0, 50, 3, 9, 31], timed=True)
    whole = plan_preferences(**inputs, top_k=4)
    monkeypatch.setattr(plan_module, "_CHUNK_ELEMENTS_CPU", elements)
    chunked = plan_preferences(**inputs, top_k=4)
    assert all(torch.equal(a, b) for a, b in zip(whole, chunked, strict=True))


def test_no_gradient_goes_through_the_selection(make_inputs):
    inputs = make_inputs([10, 4, 8])
    inputs["history_embeddings"].requires_grad_()
    inputs["candidate_embeddings"].requires_grad_()
    assert not plan_preferences(**inputs).weights.requires_grad


@pytest.mark.parametrize("eps", [1.0, 0.5, 1e-3, 1e-8])
@pytest.mark.parametrize("sigma", [0.05, 1.0, 7.3])
def test_kernel_is_cut_at_eps(sigma, eps):
    kernel = gaussian_kernel(sigma, eps, 1000)
    assert kernel[0] == 1.0
    assert bool((kernel >= eps).all())
    assert math.exp(-(len(kernel) ** 2) / (2 * sigma**2)) < eps
    assert len(gaussian_kernel(1e6, eps, 12)) <= 12


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("top_k", -1, "top_k must be an integer of at least 0, got -1"),
        ("recent", -2, "recent must be an integer of at least 0, got -2"),
        ("recent", 1.5, "recent must be an integer of at least 0, got 1.5"),
        ("sigma", 0.0, "sigma must be a finite number above 0, got 0.0"),
        ("sigma", math.inf, "sigma must be a finite number above 0, got inf"),
        ("eps", 0.0, r"eps must be in \(0, 1\], got 0.0"),
        ("eps", 1.1, r"eps must be in \(0, 1\], got 1.1"),
        ("candidate_embeddings", torch.zeros(4, 3), r"must share D, got \[9, 4\] and \[4, 3\]"),
        (
            "candidate_embeddings",
            torch.zeros(3, 4),
            "candidate_offsets must ascend .* rows, 3, got",
        ),
        ("history_offsets", torch.tensor([0, 9]), r"must both be \[B \+ 1\], got \[2\] and \[4\]"),
        ("history_offsets", torch.tensor([0, 5, 2, 9]), "history_offsets must ascend from 0"),
        ("history_offsets", torch.tensor([0, 5, 6, 8]), "history_offsets must ascend .* rows, 9,"),
        ("history_timestamps", torch.zeros(9), "candidate_timestamps is None and the other is not"),
    ],
)
def test_errors_name_the_argument(make_inputs, name, value, message):
    inputs = make_inputs([5, 1, 3], dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        plan_preferences(**{**inputs, name: value})


def test_timestamps_of_another_length_are_an_error(make_inputs):
    inputs = make_inputs([5, 1, 3], timed=True)
    inputs["candidate_timestamps"] = inputs["candidate_timestamps"][:2]
    with pytest.raises(ValueError, match=r"candidate_timestamps must have shape \[4\], got \[2\]"):
        plan_preferences(**inputs)
