"""partition_sessions against a loop, and its errors."""

from itertools import accumulate, pairwise

import pytest
import torch

from hpgr_plugin.components.sessions import check_time_unit, partition_sessions


def by_loop(timestamps: list[list[int]], gap: int) -> list[list[list[int]]]:
    users = []
    for history in timestamps:
        sessions: list[list[int]] = []
        for i, t in enumerate(history):
            if i == 0 or t - history[i - 1] > gap:
                sessions.append([])
            sessions[-1].append(t)
        users.append(sessions)
    return users


def flatten(histories: list[list[int]], dtype=torch.int64):
    flat = torch.tensor([t for h in histories for t in h], dtype=torch.int64)
    offsets = torch.tensor([0, *accumulate(len(h) for h in histories)], dtype=dtype)
    return flat, offsets


def nested(timestamps, sessions) -> list[list[list[int]]]:
    cuts, users = sessions.session_offsets.tolist(), sessions.user_offsets.tolist()
    return [
        [timestamps[cuts[s] : cuts[s + 1]].tolist() for s in range(first, last)]
        for first, last in pairwise(users)
    ]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("gap", [0, 5, 1800])
@pytest.mark.parametrize("seed", range(5))
def test_equals_a_loop(seed, gap, dtype):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 12, (9,), generator=g).tolist()
    histories = [
        torch.randint(0, 2 * gap + 2, (n,), generator=g).cumsum(0).tolist() for n in lengths
    ]
    timestamps, offsets = flatten(histories, dtype)
    sessions = partition_sessions(timestamps, offsets, gap)
    assert nested(timestamps, sessions) == by_loop(histories, gap)
    expected_index = torch.arange(len(sessions.session_offsets) - 1).repeat_interleave(
        sessions.session_offsets.diff()
    )
    assert torch.equal(sessions.session_index, expected_index)


@pytest.mark.parametrize(
    "histories", [[], [[]], [[], [], []], [[7]], [[], [7], []], [[3, 3, 3], [3, 3]]]
)
def test_edges(histories):
    timestamps, offsets = flatten(histories)
    sessions = partition_sessions(timestamps, offsets, 0)
    assert nested(timestamps, sessions) == by_loop(histories, 0)


def test_a_pause_of_exactly_the_gap_stays_inside():
    timestamps, offsets = flatten([[0, 1800, 3601]])
    assert partition_sessions(timestamps, offsets).session_offsets.tolist() == [0, 2, 3]


def test_users_do_not_share_a_session():
    timestamps, offsets = flatten([[10], [10], [11]])
    assert partition_sessions(timestamps, offsets).user_offsets.tolist() == [0, 1, 2, 3]


def test_large_timestamps_do_not_overflow():
    timestamps, offsets = flatten([[-(2**61), 2**61]])
    assert partition_sessions(timestamps, offsets).session_index.tolist() == [0, 1]


def test_unsorted_history_names_row_and_token():
    timestamps, offsets = flatten([[5, 9], [], [4, 1, 2]])
    with pytest.raises(ValueError, match=r"timestamps .* row 2 .* position 3 is 1 after 4"):
        partition_sessions(timestamps, offsets)


def test_negative_gap():
    with pytest.raises(ValueError, match="gap_seconds must be at least 0, got -1"):
        partition_sessions(torch.tensor([1]), torch.tensor([0, 1]), -1)


@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 2, 1, 3], []])
def test_offsets_that_do_not_fit(offsets):
    with pytest.raises(ValueError, match="offsets"):
        partition_sessions(torch.tensor([1, 2, 3]), torch.tensor(offsets, dtype=torch.int64))


@pytest.mark.parametrize(
    ("name", "timestamps", "offsets"),
    [
        ("timestamps", torch.tensor([1.0]), torch.tensor([0, 1])),
        ("offsets", torch.tensor([1]), torch.tensor([0.0, 1.0])),
    ],
)
def test_floats_are_refused(name, timestamps, offsets):
    with pytest.raises(TypeError, match=f"{name} must be integers"):
        partition_sessions(timestamps, offsets)


def test_two_dimensions_are_refused():
    with pytest.raises(ValueError, match="timestamps must have the 2 rows"):
        partition_sessions(torch.zeros(1, 2, dtype=torch.int64), torch.tensor([0, 2]))


@pytest.mark.parametrize(
    ("histories", "sign"),
    [
        ([[7, 7, 7, 7], [9, 9]], "median pause between neighbouring items is below 1 s"),
        ([[1_700_000_000_000, 1_700_000_020_000]], r"the latest is 1700000020000, milliseconds\?"),
        # Milliseconds: 20 s between items look like 20,000 s.
        ([[0, 20_000, 40_000], [5]], "3 items fall into 3 sessions of gap_seconds = 1800"),
    ],
)
def test_times_that_are_no_seconds_are_warned_about(histories, sign):
    with pytest.warns(UserWarning, match=f"do not look like seconds: .*{sign}"):
        check_time_unit(*flatten(histories))


@pytest.mark.parametrize("histories", [[], [[]], [[5], [], [9]], [[0, 20, 40, 60, 9000]]])
@pytest.mark.filterwarnings("error")
def test_times_in_seconds_pass(histories):
    check_time_unit(*flatten(histories))
