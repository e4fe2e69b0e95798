"""BERT4Rec (arXiv 1904.06690): a bidirectional transformer, read at a [MASK] after the history."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpgr_plugin.data.batch import Batch
from hpgr_plugin.hosts.embedded.model.rivals.interface import (
    RivalTokens,
    TransformerRival,
)
from hpgr_plugin.hosts.embedded.model.tokens import (
    NEVER_SEEN,
    Marks,
    RequestIndex,
    SequenceIndex,
    build_sequence,
)
from hpgr_plugin.ops.segments import Bucket, SegmentLayout, segment_layout


class BERT4Rec(TransformerRival):
    """One [MASK] token per candidate, at the candidate's place; its output meets the candidate.

    Items before the first candidate of a request see each other in both directions. An item
    between two candidates is the future of the first: it is seen only by later items and later
    [MASK] tokens, and sees only earlier items. With `hpgr.RequestSettings.history = 'request'`
    there are no such items, and the encoder is bidirectional throughout.

    Arguments: see `TransformerRival`.
    """

    extra_token = "mask"
    extra_places = 2
    mask: nn.Embedding

    def plan(
        self,
        batch: Batch,
        index: RequestIndex,
        *,
        context_len: int,
        device_type: str | None = None,
    ) -> tuple[SequenceIndex, SegmentLayout]:
        """See `RivalEncoder.plan`: the tokens, and the layout of the attention."""
        where = SequenceIndex.of(batch, index, context_len=context_len, dynamic_mask=True)
        return where, visibility_layout(where, device_type)

    def forward(self, tokens: RivalTokens) -> Tensor:
        """See `RivalEncoder.forward`."""
        where, layout = self.plan_of(tokens)
        sequence = build_sequence(
            tokens.batch,
            tokens.index,
            where,
            history=tokens.history,
            candidates=self.mask.weight.expand(len(tokens.candidates), -1),
            context=None if tokens.context is None else tokens.context.flatten(0, 1),
        )
        values = sequence.values + self.positions(Marks(*where.marks).positions)
        states = self.transformer(values, layout, read=where.candidate_rows)
        output: Tensor = self.match(states, tokens.candidates)
        return output


def visibility_layout(where: SequenceIndex, device_type: str | None = None) -> SegmentLayout:
    """The layout of softmax attention in which tokens see each other by their orders."""
    layout = segment_layout(where.offsets, device_type=device_type)
    marks = Marks(*where.marks.index_select(1, layout.order))
    sizes = [bucket.num_tokens for bucket in layout.buckets]
    orders = zip(marks.key_order.split(sizes), marks.query_order.split(sizes), strict=True)
    buckets = [
        bucket._replace(mask=_mask(bucket, keys, queries), is_causal=False)
        for bucket, (keys, queries) in zip(layout.buckets, orders, strict=True)
    ]
    return layout._replace(buckets=tuple(buckets))


def _mask(bucket: Bucket, key_order: Tensor, query_order: Tensor) -> Tensor:
    """`[R, 1, width, width]`; padding sees itself, so that its softmax is defined."""
    slots = torch.arange(bucket.width, device=key_order.device)
    real = slots < bucket.offsets.diff().unsqueeze(1)
    keys = key_order.new_full(real.shape, NEVER_SEEN).masked_scatter(real, key_order)
    queries = query_order.new_full(real.shape, -1).masked_scatter(real, query_order)
    seen = keys.unsqueeze(1) < queries.unsqueeze(2)
    return (seen | (slots == slots.unsqueeze(1))).unsqueeze(1)
