"""Jagged operators in plain torch, without waiting for the device."""

import torch
from torch import Tensor


def complete_cumsum(lengths: Tensor) -> Tensor:
    """Offsets of lengths `[B]`."""
    offsets = lengths.new_zeros(lengths.numel() + 1)
    offsets[1:] = lengths.cumsum(0)
    return offsets


def jagged_to_padded_dense(
    values: Tensor, offsets: Tensor, max_length: int, padding_value: float
) -> Tensor:
    """`[T, D]` to `[B, max_length, D]`; values past the last row are left out."""
    total, width = values.shape
    num_rows = offsets.numel() - 1
    rows, places = _rows_and_places(offsets, total)
    # Tails that do not fit and values past the last row all go to one slot past the end, which
    # is cut off again: no data-dependent shape, so no wait for the device.
    slots = num_rows * max_length
    kept = (places < max_length) & (rows < num_rows)
    target = torch.where(kept, rows * max_length + places, slots)
    dense = values.new_full((slots + 1, width), padding_value).index_copy(0, target, values)
    return dense[:slots].view(num_rows, max_length, width)


def dense_to_jagged(dense: Tensor, offsets: Tensor, total_length: int) -> Tensor:
    """`[B, N, D]` to `[T, D]`; values past the last row are zero."""
    num_rows, max_length, width = dense.shape
    if max_length == 0 or num_rows == 0:
        return dense.new_zeros(total_length, width)
    rows, places = _rows_and_places(offsets, total_length)
    index = rows.clamp(max=num_rows - 1) * max_length + places.clamp(max=max_length - 1)
    values = dense.reshape(num_rows * max_length, width)[index]
    kept = (places < max_length) & (rows < num_rows)
    return torch.where(kept.unsqueeze(1), values, values.new_zeros(()))


def _rows_and_places(offsets: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Row and place in the row of `total` values; values past `offsets[-1]` get row B."""
    numbers = torch.arange(total, device=offsets.device)
    starts = offsets.long()
    rows = torch.searchsorted(starts[1:].contiguous(), numbers, right=True)
    return rows, numbers - starts[rows]
