"""The selection kernels against the plan in torch: the same rows, also where scores tie."""

import pytest
import torch
from torch import Tensor
from triton_device import DEVICE, offsets_of

from hpgr_plugin.ops.preference_plan import PlanInputs, PlanSettings, count_earlier, triton
from hpgr_plugin.ops.preference_plan import torch as torch_plan


def whole_numbers(rows: int, size: int) -> Tensor:
    """Scores of whole numbers are exact in any order of summation, and tie often."""
    return torch.randint(-1, 2, (rows, size), device=DEVICE).float()


def assert_same_plan(
    history: Tensor,
    candidates: Tensor,
    lengths: list[int],
    counts: list[int],
    times: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
    **settings: float,
) -> None:
    inputs = PlanInputs(
        history, candidates, offsets_of(lengths), offsets_of(counts), *times
    ).check()
    chosen = PlanSettings(**settings)
    wanted = torch_plan.plan_preferences(inputs, chosen)
    got = triton.plan_preferences(inputs, chosen)
    assert torch.equal(got.offsets, wanted.offsets)
    assert torch.equal(got.index, wanted.index)
    torch.testing.assert_close(got.weights, wanted.weights)

    with_candidates = triton.select(inputs, chosen, with_candidates=True)
    index = with_candidates.index[: int(with_candidates.offsets[-1])].long()
    last = with_candidates.offsets[1:] - 1
    assert torch.equal(index[index < len(history)], wanted.index)
    assert index[last].tolist() == list(range(len(history), len(history) + len(candidates)))
    assert int(with_candidates.offsets.diff().max()) <= with_candidates.max_length


def test_a_selection_with_candidates() -> None:
    counts = [2, 0, 1, 3]
    history, candidates = whole_numbers(109, 6), whole_numbers(sum(counts), 6)
    assert_same_plan(history, candidates, [1, 5, 33, 70], counts, top_k=3, sigma=0.2, recent=5)


@pytest.mark.parametrize("counts", [[1, 1], [3, 2]])
def test_the_future_is_hidden(counts: list[int]) -> None:
    lengths = [90, 12]
    times = torch.cat([torch.randint(0, 20, (n,)).sort().values for n in lengths]).to(DEVICE)
    now = torch.randint(0, 22, (sum(counts),), device=DEVICE)
    assert_same_plan(
        whole_numbers(102, 20), whole_numbers(sum(counts), 20), lengths, counts, (times, now),
        top_k=5, sigma=1.0, recent=3,
    )  # fmt: skip


@pytest.mark.parametrize("counts", [[1, 1], [2, 1]])
def test_long_histories_of_many_groups(counts: list[int]) -> None:
    lengths = [12_000, 700]
    history = torch.randint(-9, 10, (sum(lengths), 4), device=DEVICE).float()
    candidates = torch.randint(-9, 10, (sum(counts), 4), device=DEVICE).float()
    assert_same_plan(history, candidates, lengths, counts, top_k=6, sigma=1.0, recent=4)


def test_equal_scores_go_to_the_most_recent() -> None:
    assert_same_plan(
        torch.ones(170, 8, device=DEVICE), torch.ones(2, 8, device=DEVICE), [150, 20], [1, 1],
        top_k=7, sigma=0.2, recent=0,
    )  # fmt: skip


def test_long_histories_are_searched_in_groups() -> None:
    history = torch.randint(-9, 10, (700, 16), device=DEVICE).float()
    candidates = torch.randint(-9, 10, (2, 16), device=DEVICE).float()
    assert_same_plan(history, candidates, [600, 100], [1, 1], top_k=9, sigma=1.0, recent=2)


def test_zero_and_minus_zero_tie() -> None:
    history = torch.zeros(20, 16, device=DEVICE)
    history[::2, 0] = -1e-30  # times 1e-30 below the smallest number: minus zero
    candidate = torch.full((1, 16), 1e-30, device=DEVICE)
    assert_same_plan(history, candidate, [20], [1], top_k=3, sigma=0.2, recent=0)


def test_rows_of_a_wider_tensor_are_read_where_they_lie() -> None:
    history, candidates = whole_numbers(30, 40)[:, 8:24], whole_numbers(2, 40)[:, 8:24]
    assert_same_plan(history, candidates, [10, 20], [1, 1], top_k=3, sigma=1.0, recent=1)


def test_no_candidates_keep_nothing() -> None:
    inputs = PlanInputs(
        whole_numbers(5, 4), whole_numbers(0, 4), offsets_of([5]), offsets_of([0])
    ).check()
    empty = triton.plan_preferences(inputs, PlanSettings())
    assert len(empty.index) == 0
    assert empty.offsets.tolist() == [0]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_earlier_items_are_counted(backend: str) -> None:
    lengths, counts = [0, 1, 40, 3], [2, 0, 70, 1]
    times = torch.cat([torch.randint(0, 60, (n,)).sort().values for n in lengths]).to(DEVICE)
    queries = torch.randint(-5, 65, (sum(counts),), device=DEVICE) + 2**40
    jagged = times + 2**40, offsets_of(lengths), queries, offsets_of(counts)
    wanted = count_earlier(*jagged, backend="naive")
    assert torch.equal(count_earlier(*jagged, backend=backend), wanted)
    bounds = {"max_history": 40, "max_candidates": 70}
    assert torch.equal(count_earlier(*jagged, **bounds, backend=backend), wanted)


@pytest.mark.parametrize("backend", ["triton", "torch", "naive"])
def test_no_candidates_count_nothing(backend: str) -> None:
    nothing = torch.empty(0, dtype=torch.int64, device=DEVICE)
    jagged = torch.arange(5, device=DEVICE), offsets_of([5]), nothing, offsets_of([0])
    assert count_earlier(*jagged, backend=backend).shape == (0,)


def test_cases_without_a_kernel_have_a_reason() -> None:
    def reason(max_history: int, dtype: torch.dtype = torch.float32, **settings: float) -> str:
        one = torch.ones(1, 1, dtype=dtype)
        inputs = PlanInputs(one, one, offsets_of([1]), offsets_of([1]), max_history=max_history)
        return str(triton.why_not(inputs, PlanSettings(**settings)))

    assert reason(2**18) == "None"
    assert "history of" in reason(2**19)
    assert "float64" in reason(9, torch.float64)
    assert "top_k=1000" in reason(5000, top_k=1000, sigma=100.0)


def test_bounds_are_required() -> None:
    inputs = PlanInputs(whole_numbers(5, 4), whole_numbers(1, 4), offsets_of([5]), offsets_of([1]))
    with pytest.raises(ValueError, match="max_history and max_candidates, got None and None"):
        triton.select(inputs, PlanSettings(), with_candidates=True)
