"""Relative attention bias by position and by log-bucketed time.

It reads the tokens' own positions and times, so it says the same of two tokens whether the
history between them was shortened or not.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class _TableLookup(torch.autograd.Function):
    """``table[index]`` for a small table and very many indices.

    The backward of an ordinary lookup sorts the indices; a histogram is one pass.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = table.shape[0]
        return table.index_select(0, index.reshape(-1)).view(index.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        # double: the sum runs over millions of pairs
        total = torch.bincount(index.reshape(-1), grad.reshape(-1).double(), minlength=ctx.size)
        return total.to(grad.dtype), None


class RelativeBias(nn.Module):
    """Bias tables of every layer over joint (position, time) buckets.

    Args:
        num_layers: one table pair a layer, shared by its heads.
        exact_positions: distances below it have a bucket each; above it they are logarithmic.
        position_buckets: buckets for distances, each sign its own.
        time_buckets: buckets of ``log2(1 + seconds)``.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        exact_positions: int = 16,
        position_buckets: int = 32,
        time_buckets: int = 32,
    ) -> None:
        super().__init__()
        if not 0 < exact_positions < position_buckets:
            raise ValueError(
                f"exact_positions must be in 1..{position_buckets - 1} (position_buckets - 1), "
                f"got {exact_positions}"
            )
        self.exact_positions = exact_positions
        self.position_buckets = position_buckets
        self.time_buckets = time_buckets
        self.position_table = nn.Parameter(torch.zeros(num_layers, 2 * position_buckets))
        self.time_table = nn.Parameter(torch.zeros(num_layers, time_buckets))

    def buckets(
        self,
        query_positions: Tensor,
        query_times: Tensor,
        key_positions: Tensor,
        key_times: Tensor,
    ) -> Tensor:
        """Joint bucket of every (row, column): ``[B, Q]`` and ``[B, K]`` -> ``[B, Q, K]`` int32."""
        distance = query_positions.unsqueeze(2) - key_positions.unsqueeze(1)
        seconds = (query_times.unsqueeze(2) - key_times.unsqueeze(1)).abs()
        time = torch.log2(1.0 + seconds.float()).int().clamp_(max=self.time_buckets - 1)
        return self._position_bucket(distance) * self.time_buckets + time

    def _position_bucket(self, distance: Tensor) -> Tensor:
        near = distance.abs().int()
        scale = (self.position_buckets - self.exact_positions) / math.log2(64)
        far = torch.log2(near.float().clamp(min=1.0) / self.exact_positions) * scale
        far = (far.int() + self.exact_positions).clamp_(max=self.position_buckets - 1)
        bucket = torch.where(near < self.exact_positions, near, far)
        return torch.where(distance < 0, bucket + self.position_buckets, bucket)

    def forward(self, layer: int, buckets: Tensor) -> Tensor:
        """The bias of ``layer`` for ``buckets`` (any shape)."""
        joint = self.position_table[layer].unsqueeze(1) + self.time_table[layer].unsqueeze(0)
        return _TableLookup.apply(joint.reshape(-1), buckets)
