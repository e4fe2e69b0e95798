"""GRU4Rec (arXiv 1511.06939): a recurrent network over the history."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpgr_plugin.components.checks import check_at_least
from hpgr_plugin.hosts.embedded.model.rivals.interface import (
    Match,
    RivalEncoder,
    RivalSizes,
    RivalTokens,
    token_table,
)
from hpgr_plugin.ops.jagged import jagged_to_padded_dense


class GRU4Rec(RivalEncoder):
    """The GRU's state after the last visible item, matched with the candidate.

    A learned start token (with the user's features) comes first, so an empty history has a state.

    Args:
        sizes: see `RivalEncoder`.
        num_layers: recurrent layers.
    """

    def __init__(self, *, sizes: RivalSizes, num_layers: int = 1) -> None:
        super().__init__(sizes=sizes)
        check_at_least(1, num_layers=num_layers)
        self.start = token_table(1, sizes.embedding_dim)
        self.gru = nn.GRU(sizes.embedding_dim, sizes.embedding_dim, num_layers, batch_first=True)
        self.dropout = nn.Dropout(sizes.dropout)
        self.match = Match(sizes.embedding_dim, sizes.dropout)

    def forward(self, tokens: RivalTokens) -> Tensor:
        """See `RivalEncoder.forward`."""
        values, offsets, _ = tokens.with_start(tokens.users() + self.start.weight)
        width = tokens.index.longest_history + 1
        padded = jagged_to_padded_dense(values, offsets, width)
        with torch.autocast(padded.device.type, enabled=False):  # hundreds of steps add up
            states, _ = self.gru(padded.to(self.start.weight.dtype))
        place = tokens.place_of_last_visible(width)
        state = self.dropout(states.flatten(0, 1).index_select(0, place))
        output: Tensor = self.match(state, tokens.candidates)
        return output
