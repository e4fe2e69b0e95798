"""SASRec (arXiv 1808.09781): a causal transformer over the history."""

from __future__ import annotations

from torch import Tensor, nn

from hpgr_plugin.data.batch import Batch
from hpgr_plugin.hosts.embedded.model.rivals.interface import (
    RivalTokens,
    TransformerRival,
    offsets_with_start,
)
from hpgr_plugin.hosts.embedded.model.tokens import RequestIndex
from hpgr_plugin.ops.jagged import segment_positions
from hpgr_plugin.ops.segments import SegmentLayout, segment_layout


class SASRec(TransformerRival):
    """Causal softmax attention; its output at the last visible item is matched with the candidate.

    A learned start token (with the user's features) comes first, so an empty history has an output.
    Positions are learned vectors, counted from the oldest item.

    Arguments: see `TransformerRival`.
    """

    extra_token = "start"
    extra_places = 1
    start: nn.Embedding

    def plan(
        self,
        batch: Batch,
        index: RequestIndex,
        *,
        context_len: int,
        device_type: str | None = None,
    ) -> SegmentLayout:
        """See `RivalEncoder.plan`: the layout of the attention."""
        return segment_layout(offsets_with_start(batch), causal=True, device_type=device_type)

    def forward(self, tokens: RivalTokens) -> Tensor:
        """See `RivalEncoder.forward`."""
        values, offsets, last = tokens.with_start(tokens.users() + self.start.weight)
        values = values + self.positions(segment_positions(offsets, len(values)))
        states = self.transformer(values, self.plan_of(tokens), read=last)
        output: Tensor = self.match(states, tokens.candidates)
        return output
