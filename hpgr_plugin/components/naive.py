"""Small components as loops that follow the formulas: the references of their tests."""

import math

import torch
from torch import Tensor


def time_aware_index(*times: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 4: every candidate by itself inserted into its user's history, numbered 1..N+1.

    Args:
        times: as in `positions.time_aware_index`.

    Returns:
        `history_index [sum over candidates of N_b]` and `candidate_index [C]`, int64.
    """
    history_timestamps, history_offsets, candidate_timestamps, candidate_offsets = times
    history_index: list[int] = []
    candidate_index: list[int] = []
    for b in range(len(history_offsets) - 1):
        row = history_timestamps[int(history_offsets[b]) : int(history_offsets[b + 1])].tolist()
        for c in range(int(candidate_offsets[b]), int(candidate_offsets[b + 1])):
            place = 1 + sum(time < int(candidate_timestamps[c]) for time in row)
            numbers = [number for number in range(1, len(row) + 2) if number != place]
            history_index += numbers
            candidate_index.append(place)
    return (
        torch.tensor(history_index, dtype=torch.int64),
        torch.tensor(candidate_index, dtype=torch.int64),
    )


def stochastic_length(length: int, max_history: int, alpha: float) -> tuple[int, float]:
    """HSTU's Eq. 4: how many items a shortened history keeps, and how often it stays whole.

    Returns:
        `(kept, probability)`: a history longer than kept = floor(N_c^(alpha / 2)) stays whole
        with probability min(1, N_c^alpha / n^2); a history up to that length always does.
    """
    kept = math.floor(round(max_history ** (alpha / 2.0), 9))  # 64^(2/3) is 15.999... in floats
    if length <= kept:
        return kept, 1.0
    return kept, min(1.0, max_history**alpha / length**2)
