"""Jagged operators in plain torch, without waiting for the device."""

import torch
from torch import Tensor

from hpgr_plugin.ops.jagged.segments import segment_ids, segment_positions


def complete_cumsum(lengths: Tensor) -> Tensor:
    """Offsets of lengths `[B]`."""
    offsets = lengths.new_zeros(lengths.numel() + 1)
    offsets[1:] = lengths.cumsum(0)
    return offsets


def jagged_to_padded_dense(
    values: Tensor, offsets: Tensor, max_length: int, padding_value: float
) -> Tensor:
    """`[T, D]` to `[B, max_length, D]`."""
    total, width = values.shape
    num_rows = offsets.numel() - 1
    rows, places = segment_ids(offsets, total), segment_positions(offsets, total)
    # Tails that do not fit all go to one slot past the end, which is cut off again: no
    # data-dependent shape, so no wait for the device.
    slots = num_rows * max_length
    target = torch.where(places < max_length, rows * max_length + places, slots)
    dense = values.new_full((slots + 1, width), padding_value).index_copy(0, target, values)
    return dense[:slots].view(num_rows, max_length, width)


def dense_to_jagged(dense: Tensor, offsets: Tensor, total_length: int) -> Tensor:
    """`[B, N, D]` to `[T, D]`."""
    num_rows, max_length, width = dense.shape
    if max_length == 0:
        return dense.new_zeros(total_length, width)
    rows, places = segment_ids(offsets, total_length), segment_positions(offsets, total_length)
    index = rows * max_length + places.clamp(max=max_length - 1)
    values = dense.reshape(num_rows * max_length, width)[index]
    return torch.where((places < max_length).unsqueeze(1), values, values.new_zeros(()))
