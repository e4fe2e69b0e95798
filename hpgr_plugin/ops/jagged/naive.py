"""Jagged operators as loops over rows: the reference."""

import torch
from torch import Tensor


def complete_cumsum(lengths: Tensor) -> Tensor:
    """Offsets of lengths `[B]`."""
    offsets = [0]
    for length in lengths.tolist():
        offsets.append(offsets[-1] + length)
    return lengths.new_tensor(offsets)


def jagged_to_padded_dense(
    values: Tensor, offsets: Tensor, max_length: int, padding_value: float
) -> Tensor:
    """`[T, D]` to `[B, max_length, D]`; values past the last row are left out."""
    rows = [values.new_zeros(0, max_length, values.shape[1])]
    for start, end in zip(offsets.tolist(), offsets[1:].tolist(), strict=False):
        row = values[start:end][:max_length]
        padding = values.new_full((max_length - len(row), values.shape[1]), padding_value)
        rows.append(torch.cat([row, padding])[None])
    return torch.cat(rows)


def dense_to_jagged(dense: Tensor, offsets: Tensor, total_length: int) -> Tensor:
    """`[B, N, D]` to `[T, D]`; values past the last row are zero."""
    rows = [dense.new_zeros(0, dense.shape[2])]
    for b, length in enumerate(offsets.diff().tolist()):
        row = dense[b, :length]
        rows += [row, dense.new_zeros(length - len(row), dense.shape[2])]
    rows.append(dense.new_zeros(total_length - int(offsets[-1]), dense.shape[2]))
    return torch.cat(rows)
