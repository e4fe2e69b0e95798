"""Eq. 4 against the loops of naive.py, and the encoder against Eq. 4."""

import pytest
import torch

from hpgr_plugin.components import naive as naive_components
from hpgr_plugin.components.positions import (
    TimeAwarePositionalEncoder,
    VisibilityCheck,
    time_aware_index,
)
from hpgr_plugin.errors import HpgrError


@pytest.fixture
def make_times(offsets_of, sorted_times):
    def build(lengths, counts):
        return {
            "history_timestamps": sorted_times(lengths, 10),
            "history_offsets": offsets_of(lengths),
            "candidate_timestamps": torch.randint(-1, 12, (sum(counts),)),
            "candidate_offsets": offsets_of(counts),
        }

    return build


def encode(encoder, times, history, candidates):
    return encoder(
        history,
        times["history_offsets"],
        times["history_timestamps"],
        candidates,
        times["candidate_offsets"],
        times["candidate_timestamps"],
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_index_equals_the_loops(make_times, lengths, seed, dtype):
    torch.manual_seed(seed)
    times = make_times(lengths, torch.randint(0, 4, (len(lengths),)).tolist())
    want = naive_components.time_aware_index(*times.values())
    times["history_offsets"] = times["history_offsets"].to(dtype)
    times["candidate_offsets"] = times["candidate_offsets"].to(dtype)
    for got, expected in zip(time_aware_index(**times), want, strict=True):
        assert got.dtype == torch.int64
        assert torch.equal(got, expected)


def test_merged_numbers_are_all_there_once(make_times):
    times = make_times([6, 0, 9], [2, 1, 3])
    history, candidates = time_aware_index(**times)
    rows = history.split([6, 6, 0, 9, 9, 9])
    for row, candidate in zip(rows, candidates.tolist(), strict=True):
        assert sorted([*row.tolist(), candidate]) == list(range(1, len(row) + 2))


def test_the_longest_history(make_times):
    times = make_times([16384], [2])
    times["history_timestamps"] = torch.randint(0, 2**40, (16384,)).sort().values
    times["candidate_timestamps"] = times["history_timestamps"][[5000, 16383]] + 1
    _, candidates = time_aware_index(**times)
    assert candidates.tolist() == [5002, 16385]


def test_shared_history_is_exact_for_what_a_candidate_may_see(make_times):
    lengths, counts = [6, 0, 9, 3], [2, 1, 3, 0]
    times = make_times(lengths, counts)
    encoder = TimeAwarePositionalEncoder(embedding_dim=4, max_positions=10).double()
    history = torch.randn(sum(lengths), 4, dtype=torch.float64)
    candidates = torch.randn(sum(counts), 4, dtype=torch.float64)
    got_history, got_candidates = encode(encoder, times, history, candidates)

    index, candidate_index = time_aware_index(**times)
    table = encoder.table.weight
    assert torch.equal(got_candidates, candidates + table[candidate_index - 1])
    first, seen = 0, 0
    for c, user in enumerate(b for b, n in enumerate(counts) for _ in range(n)):
        rows = slice(int(times["history_offsets"][user]), int(times["history_offsets"][user + 1]))
        numbers = index[first : first + lengths[user]]
        first += lengths[user]
        visible = times["history_timestamps"][rows] < times["candidate_timestamps"][c]
        want = history[rows] + table[numbers - 1]
        assert torch.equal(got_history[rows][visible], want[visible])
        seen += int(visible.sum())
    assert seen > 0


def test_the_future_moves_up_where_it_is_not_hidden(make_times):
    lengths, counts = [6, 0, 9, 3], [1, 1, 1, 0]
    times = make_times(lengths, counts)
    times["candidate_timestamps"] = torch.tensor([4, 4, 4])
    encoder = TimeAwarePositionalEncoder(embedding_dim=4, max_positions=10, hide_future=False)
    history, candidates = torch.zeros(sum(lengths), 4), torch.zeros(3, 4)
    got_history, got_candidates = encode(encoder, times, history, candidates)
    index, candidate_index = time_aware_index(**times)
    # The last user has no candidate and keeps plain numbers.
    index = torch.cat([index, torch.tensor([1, 2, 3])])
    assert torch.equal(got_history, encoder.table.weight[index - 1])
    assert torch.equal(got_candidates, encoder.table.weight[candidate_index - 1])


def test_the_relative_form_leaves_the_tokens_to_the_bias(make_times):
    times = make_times([6, 0, 9], [2, 1, 3])
    encoder = TimeAwarePositionalEncoder(embedding_dim=4, form="relative")
    history, candidates = torch.randn(15, 4), torch.randn(6, 4)
    got_history, got_candidates = encode(encoder, times, history, candidates)
    assert torch.equal(got_history, history)
    assert torch.equal(got_candidates, candidates)
    assert not list(encoder.parameters())


def test_the_relative_form_checks_what_the_absolute_one_does(make_times):
    times = make_times([5], [2])
    shown = TimeAwarePositionalEncoder(embedding_dim=2, form="relative", hide_future=False)
    with pytest.raises(ValueError, match=r"hide_future=False .* for each user, got 2"):
        encode(shown, times, torch.zeros(5, 2), torch.zeros(2, 2))
    times["history_timestamps"] = torch.tensor([1, 2, 3, 9, 8])
    with pytest.raises(ValueError, match=r"history_timestamps must ascend .* row 0"):
        encode(
            TimeAwarePositionalEncoder(embedding_dim=2, form="relative"),
            times,
            torch.zeros(5, 2),
            torch.zeros(2, 2),
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "rotary"}, "form must be one of absolute, relative, got 'rotary'"),
        ({}, "TimeAwarePositionalEncoder.max_positions must be bound for form = 'absolute'"),
    ],
)
def test_a_form_that_cannot_be_built_is_one_line(settings, message):
    with pytest.raises(HpgrError, match=message):
        TimeAwarePositionalEncoder(embedding_dim=2, **settings)


def test_gradients_reach_table_and_embeddings(make_times):
    times = make_times([4, 2], [1, 2])
    encoder = TimeAwarePositionalEncoder(embedding_dim=3, max_positions=6)
    history, candidates = (
        torch.randn(6, 3, requires_grad=True),
        torch.randn(3, 3, requires_grad=True),
    )
    outputs = encode(encoder, times, history, candidates)
    (outputs[0].sum() + outputs[1].sum()).backward()
    assert torch.equal(history.grad, torch.ones(6, 3))
    assert torch.equal(candidates.grad, torch.ones(3, 3))
    _, candidate_index = time_aware_index(**times)
    used = torch.cat([torch.tensor([1, 2, 3, 4, 1, 2]), candidate_index])
    counts = torch.bincount(used - 1, minlength=6).float()
    assert torch.equal(encoder.table.weight.grad, counts[:, None].expand(6, 3))


def test_too_long_a_history_is_an_error(make_times):
    encoder = TimeAwarePositionalEncoder(embedding_dim=2, max_positions=5)
    fits = make_times([4, 5], [1, 0])
    encode(encoder, fits, torch.zeros(9, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"max_positions is 5, but a history .* up to 6"):
        encode(encoder, make_times([5], [1]), torch.zeros(5, 2), torch.zeros(1, 2))


def test_several_candidates_need_a_hidden_future(make_times):
    encoder = TimeAwarePositionalEncoder(embedding_dim=2, max_positions=9, hide_future=False)
    with pytest.raises(ValueError, match=r"hide_future=False .* for each user, got 2"):
        encode(encoder, make_times([5], [2]), torch.zeros(5, 2), torch.zeros(2, 2))


def test_a_history_out_of_order_is_an_error(make_times):
    times = make_times([3, 2], [1, 0])
    times["history_timestamps"] = torch.tensor([1, 2, 3, 9, 8])
    with pytest.raises(ValueError, match=r"history_timestamps must ascend .* row 1"):
        time_aware_index(**times)
    encoder = TimeAwarePositionalEncoder(embedding_dim=2, max_positions=9)
    with pytest.raises(ValueError, match=r"history_timestamps must ascend .* row 1"):
        encode(encoder, times, torch.zeros(5, 2), torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("candidate_timestamps", torch.zeros(2), "candidate_timestamps must have the 1 rows"),
        ("history_timestamps", torch.zeros(4), "history_timestamps must have the 3 rows"),
        ("candidate_offsets", torch.tensor([0, 1, 1]), r"must both be \[B \+ 1\]"),
    ],
)
def test_shapes_that_do_not_match_are_an_error(make_times, name, value, message):
    with pytest.raises(ValueError, match=message):
        time_aware_index(**{**make_times([3], [1]), name: value})


@pytest.mark.parametrize("name", ["embedding_dim", "max_positions"])
def test_sizes_below_one_are_an_error(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        TimeAwarePositionalEncoder(**{"embedding_dim": 2, "max_positions": 2, name: 0})


class TestVisibilityCheck:
    lengths = torch.tensor([3, 3, 0, 5])

    def test_blind_candidates_are_an_error_that_names_feature_share_and_binding(self):
        check = VisibilityCheck(times="query_time", binding="X.hide_future = False", batches=2)
        check(torch.tensor([0, 1, 0, 0]), self.lengths)
        with pytest.raises(HpgrError, match=r"4 of 6 .*67%.* by query_time .* X\.hide_future"):
            check(torch.tensor([0, 1, 0, 0]), self.lengths)

    @pytest.mark.filterwarnings("error")
    def test_a_smaller_share_is_one_warning(self):
        check = VisibilityCheck(batches=2)
        check(torch.tensor([0, 1, 0, 2]), self.lengths)
        with pytest.warns(UserWarning, match=r"1 of 6 candidates \(17%\)"):
            check(torch.tensor([3, 3, 0, 5]), self.lengths)
        check(torch.zeros(4, dtype=torch.int64), self.lengths)  # the verdict has been given
        check.finish()

    @pytest.mark.filterwarnings("error")
    def test_candidates_without_history_do_not_count(self):
        check = VisibilityCheck(batches=1)
        check(torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))

    def test_finish_gives_the_verdict_of_a_short_run(self):
        check = VisibilityCheck()
        check.finish()
        check = VisibilityCheck()
        check(torch.tensor([0]), torch.tensor([2]))
        with pytest.raises(HpgrError, match="1 of 1 candidates"):
            check.finish()

    @pytest.mark.parametrize(("name", "value"), [("max_blind_share", 1.5), ("batches", 0)])
    def test_settings_out_of_range(self, name, value):
        with pytest.raises(HpgrError, match=name):
            VisibilityCheck(**{name: value})
