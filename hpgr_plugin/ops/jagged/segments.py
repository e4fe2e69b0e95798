"""Index arithmetic on the offsets of a jagged tensor."""

import torch
from torch import Tensor


def segment_ids(offsets: Tensor, total_length: int) -> Tensor:
    """The row that each value belongs to, `[T]` int64: b repeated lengths[b] times."""
    rows = torch.arange(offsets.numel() - 1, device=offsets.device)
    return rows.repeat_interleave(offsets.diff(), output_size=total_length)


def segment_positions(offsets: Tensor, total_length: int) -> Tensor:
    """The place of each value in its row, counted from 0, `[T]` int64."""
    starts = offsets[:-1].long()[segment_ids(offsets, total_length)]
    return torch.arange(total_length, device=offsets.device) - starts


def ranges(starts: Tensor, lengths: Tensor, total_length: int | None = None) -> Tensor:
    """`arange(start, start + length)` for each of `[R]` pairs, concatenated, int64.

    The flat index that gathers whole rows: `values[ranges(offsets[:-1][rows], lengths[rows])]`.

    Args:
        starts: `[R]`.
        lengths: `[R]`.
        total_length: the sum of the lengths; None: the device is asked for it.
    """
    counts = lengths.long()
    shift = starts.long() - (counts.cumsum(0) - counts)
    shift = shift.repeat_interleave(counts, output_size=total_length)
    return torch.arange(shift.numel(), device=starts.device) + shift


def lead_with(
    row: Tensor, values: Tensor, offsets: Tensor, segment: Tensor
) -> tuple[Tensor, Tensor]:
    """Put `row` in front of every segment.

    Args:
        row: `[D]`.
        values: `[T, D]`.
        offsets: `[S + 1]`.
        segment: `[T]`, the segment of each value.

    Returns:
        Values `[T + S, D]` and offsets `[S + 1]`.
    """
    total, number = len(values), torch.arange(len(values) + len(offsets), device=offsets.device)
    offsets_out = offsets + number[: len(offsets)]
    moved = number[:total] + segment + 1
    out = values.new_empty(total + len(offsets) - 1, values.shape[1])
    out = out.index_copy(0, offsets_out[:-1], row.expand(len(offsets) - 1, -1))
    return out.index_copy(0, moved, values), offsets_out


def check_sorted(values: Tensor, offsets: Tensor, name: str) -> None:
    """Check that every row of the jagged values `[T]` ascends; equal neighbours are in order.

    Raises:
        ValueError: naming the argument, the row and the first two values out of order.
    """
    ids = segment_ids(offsets, values.numel())
    descends = (values[1:] < values[:-1]) & (ids[1:] == ids[:-1])
    if bool(descends.any()):
        at = int(descends.nonzero()[0, 0]) + 1
        raise ValueError(
            f"{name} must ascend in every row, but in row {int(ids[at])} the value at flat "
            f"position {at} is {values[at].item()} after {values[at - 1].item()}"
        )
