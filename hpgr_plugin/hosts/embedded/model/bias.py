"""Relative attention bias by position and by log-bucketed time, one pair of tables per layer."""

from __future__ import annotations

import torch
from torch import nn

from hpgr_plugin.errors import HpgrError
from hpgr_plugin.ops.hstu_attention import PositionTimeBias


class RelativeBias(nn.Module):
    """Bias tables of every layer, shared by its heads.

    Args:
        num_layers: L.
        exact_positions: distances below it have a bucket each; above it they are logarithmic.
        position_buckets: buckets for distances, each sign its own.
        time_buckets: buckets of `log2(1 + seconds)`.

    Raises:
        HpgrError: `exact_positions` is not below `position_buckets`.
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
            raise HpgrError(
                f"exact_positions must be in 1..{position_buckets - 1} (position_buckets - 1), "
                f"got {exact_positions}"
            )
        self.exact_positions = exact_positions
        self.position_table = nn.Parameter(torch.zeros(num_layers, 2 * position_buckets))
        self.time_table = nn.Parameter(torch.zeros(num_layers, time_buckets))

    def forward(self, layer: int) -> PositionTimeBias:
        """The bias of one layer, as the attention takes it."""
        return PositionTimeBias(
            self.position_table[layer], self.time_table[layer], self.exact_positions
        )
