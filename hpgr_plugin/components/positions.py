"""Time-aware positions (Eq. 4): a candidate stands where its time puts it in the history."""

import torch
from torch import Tensor, nn

from hpgr_plugin.ops.jagged import check_sorted, ranges, segment_ids, segment_positions


def time_aware_index(
    history_timestamps: Tensor,
    history_offsets: Tensor,
    candidate_timestamps: Tensor,
    candidate_offsets: Tensor,
) -> tuple[Tensor, Tensor]:
    """Eq. 4: Index(C) = 1 + sum_i [t_i < t_C], strictly; the merged sequence is numbered 1..N+1.

    Each candidate is inserted alone: history items at or after t_C move up by one for it.

    Args:
        history_timestamps: `[T]`, ascending in every history.
        history_offsets: `[B + 1]`.
        candidate_timestamps: `[C]`, in the same unit.
        candidate_offsets: `[B + 1]`.

    Returns:
        `history_index [sum over candidates of N_b]`, the histories candidate after candidate,
        and `candidate_index [C]`, both int64 and counted from 1.

    Raises:
        ValueError: a history out of order (which row), or shapes that do not match.
    """
    _check_shapes(history_timestamps, history_offsets, candidate_timestamps, candidate_offsets)
    check_sorted(history_timestamps, history_offsets, "history_timestamps")
    earlier = count_earlier(
        history_timestamps, history_offsets, candidate_timestamps, candidate_offsets
    )
    users = segment_ids(candidate_offsets, len(candidate_timestamps))
    lengths = history_offsets.long().diff()[users]
    number = 1 + ranges(torch.zeros_like(lengths), lengths)
    earlier_of_pair = earlier.repeat_interleave(lengths, output_size=len(number))
    return number + (number > earlier_of_pair), 1 + earlier


class TimeAwarePositionalEncoder(nn.Module):
    """Adds a learned vector for the time-aware index (Eq. 4) to histories and candidates.

    This is the form with one history shared by all candidates of a user. With `hide_future`, the
    items that a candidate may see (t_i < t_C) have the same numbers for every candidate, so
    sharing is exact; items at or after t_C are the host's to mask. Without it, those items
    would need another number for each candidate, so every user may have one candidate at most.

    Args:
        embedding_dim: D.
        max_positions: largest index, at least the longest history plus one.
        hide_future: whether a candidate's future is masked from it.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, *, embedding_dim: int, max_positions: int, hide_future: bool = True) -> None:
        super().__init__()
        for name, value in (("embedding_dim", embedding_dim), ("max_positions", max_positions)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.max_positions = max_positions
        self.hide_future = hide_future
        # Index 1 is row 0.
        self.table = nn.Embedding(max_positions, embedding_dim)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(
        self,
        history_embeddings: Tensor,
        history_offsets: Tensor,
        history_timestamps: Tensor,
        candidate_embeddings: Tensor,
        candidate_offsets: Tensor,
        candidate_timestamps: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Histories `[T, D]` and candidates `[C, D]` with their positions added.

        Args:
            history_embeddings: `[T, D]`.
            history_offsets: `[B + 1]`.
            history_timestamps: `[T]` seconds, ascending in every history.
            candidate_embeddings: `[C, D]`.
            candidate_offsets: `[B + 1]`.
            candidate_timestamps: `[C]` seconds.

        Raises:
            ValueError: a history out of order, a history too long for `max_positions`, several
                candidates a user without `hide_future`, or shapes that do not match.
        """
        _check_shapes(history_timestamps, history_offsets, candidate_timestamps, candidate_offsets)
        check_sorted(history_timestamps, history_offsets, "history_timestamps")
        self._check_lengths(history_offsets, candidate_offsets)
        earlier = count_earlier(
            history_timestamps, history_offsets, candidate_timestamps, candidate_offsets
        )
        # Row of the table = index - 1: a place in the history, or the number of earlier items.
        rows = segment_positions(history_offsets, len(history_timestamps))
        if not self.hide_future:
            rows = rows + _moved_up(rows, earlier, history_offsets, candidate_offsets)
        return (
            history_embeddings + self.table(rows),
            candidate_embeddings + self.table(earlier),
        )

    def _check_lengths(self, history_offsets: Tensor, candidate_offsets: Tensor) -> None:
        lengths = history_offsets.diff().tolist()
        candidates = candidate_offsets.diff().tolist()
        # A user without a candidate has no index N + 1.
        needed = max(
            (n + (c > 0) for n, c in zip(lengths, candidates, strict=True)),
            default=0,
        )
        if needed > self.max_positions:
            raise ValueError(
                f"max_positions is {self.max_positions}, but a history with its candidate "
                f"needs positions up to {needed}"
            )
        if not self.hide_future and max(candidates, default=0) > 1:
            raise ValueError(
                "hide_future=False numbers a history anew for every candidate, so a shared "
                f"history takes one candidate a user, got {max(candidates)}; expand to one "
                "sequence per candidate first"
            )


def count_earlier(
    history_timestamps: Tensor,
    history_offsets: Tensor,
    candidate_timestamps: Tensor,
    candidate_offsets: Tensor,
) -> Tensor:
    """How many items of its user's history lie before each candidate, strictly, `[C]` int64."""
    users = segment_ids(candidate_offsets, len(candidate_timestamps))
    start = history_offsets[:-1].long()[users]
    low, high = start, history_offsets[1:].long()[users]
    # A binary search in all rows at once. One step too many changes nothing, so the number of
    # steps comes from the total length, which is known without waiting for the device.
    last = max(0, len(history_timestamps) - 1)
    for _ in range(len(history_timestamps).bit_length()):
        middle = (low + high) // 2
        before = history_timestamps[middle.clamp(max=last)] < candidate_timestamps
        open_ = low < high
        low = torch.where(open_ & before, middle + 1, low)
        high = torch.where(open_ & ~before, middle, high)
    return low - start


def _moved_up(
    rows: Tensor, earlier: Tensor, history_offsets: Tensor, candidate_offsets: Tensor
) -> Tensor:
    """1 for items at or after their user's only candidate, else 0, `[T]` int64."""
    users = segment_ids(candidate_offsets, len(earlier))
    # A user without a candidate has nothing inserted: no item lies after it.
    boundary = rows.new_full((history_offsets.numel() - 1,), len(rows))
    boundary = boundary.index_copy(0, users, earlier)
    return (rows >= boundary[segment_ids(history_offsets, len(rows))]).long()


def _check_shapes(
    history_timestamps: Tensor,
    history_offsets: Tensor,
    candidate_timestamps: Tensor,
    candidate_offsets: Tensor,
) -> None:
    if history_offsets.shape != candidate_offsets.shape or history_offsets.numel() == 0:
        raise ValueError(
            "history_offsets and candidate_offsets must both be [B + 1], got "
            f"{list(history_offsets.shape)} and {list(candidate_offsets.shape)}"
        )
    for name, times, offsets in (
        ("history_timestamps", history_timestamps, history_offsets),
        ("candidate_timestamps", candidate_timestamps, candidate_offsets),
    ):
        if times.shape != (int(offsets[-1]),):
            raise ValueError(
                f"{name} must have the {int(offsets[-1])} rows that its offsets end at, "
                f"got shape {list(times.shape)}"
            )
