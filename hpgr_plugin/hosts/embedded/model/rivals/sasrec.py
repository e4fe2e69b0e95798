"""SASRec (arXiv 1808.09781): a causal transformer over the history."""

from __future__ import annotations

from torch import Tensor

from hpgr_plugin.components.transformer import JaggedEncoder
from hpgr_plugin.hosts.embedded.model.rivals.interface import (
    Match,
    RivalEncoder,
    RivalSizes,
    RivalTokens,
    token_table,
)
from hpgr_plugin.ops.jagged import segment_positions
from hpgr_plugin.ops.segments import segment_layout


class SASRec(RivalEncoder):
    """Causal softmax attention; its output at the last visible item is matched with the candidate.

    A learned start token (with the user's features) comes first, so an empty history has an output.
    Positions are learned vectors, counted from the oldest item.

    Args:
        sizes: see `RivalEncoder`.
        num_layers: attention layers.
    """

    def __init__(self, *, sizes: RivalSizes, num_layers: int = 2) -> None:
        super().__init__(sizes=sizes)
        self.start = token_table(1, sizes.embedding_dim)
        self.positions = token_table(sizes.max_history + 1, sizes.embedding_dim)
        self.transformer = JaggedEncoder(
            embedding_dim=sizes.embedding_dim,
            num_heads=sizes.num_heads,
            num_layers=num_layers,
            dropout=sizes.dropout,
            final_norm=True,
        )
        self.match = Match(sizes.embedding_dim, sizes.dropout)

    def forward(self, tokens: RivalTokens) -> Tensor:
        """See `RivalEncoder.forward`."""
        values, offsets, last = tokens.with_start(tokens.users() + self.start.weight)
        values = values + self.positions(segment_positions(offsets, len(values)))
        layout = segment_layout(offsets, causal=True)
        states = self.transformer(values, layout, read=last)
        output: Tensor = self.match(states, tokens.candidates)
        return output
