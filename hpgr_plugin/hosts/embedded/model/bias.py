"""Relative attention bias by position and by log-bucketed time, one pair of tables per layer."""

from __future__ import annotations

import torch
from torch import nn

from hpgr_plugin.ops.hstu_attention import PositionTimeBias

EXACT_POSITIONS = 16  # distances below it have a bucket each; above it they are logarithmic
POSITION_BUCKETS = 32  # for distances, each sign its own
TIME_BUCKETS = 32  # of log2(1 + seconds)


class RelativeBias(nn.Module):
    """Bias tables of `num_layers` layers, each shared by the heads of its layer."""

    def __init__(self, *, num_layers: int) -> None:
        super().__init__()
        self.position_table = nn.Parameter(torch.zeros(num_layers, 2 * POSITION_BUCKETS))
        self.time_table = nn.Parameter(torch.zeros(num_layers, TIME_BUCKETS))

    def forward(self, layer: int) -> PositionTimeBias:
        """The bias of one layer, as the attention takes it."""
        return PositionTimeBias(self.position_table[layer], self.time_table[layer], EXACT_POSITIONS)
