"""SEM's two passes in plain torch, sessions padded in buckets of similar length."""

import torch.nn.functional as F
from torch import Tensor

from hpgr_plugin.ops.jagged import segment_ids
from hpgr_plugin.ops.segments import first_token_attention, segment_layout
from hpgr_plugin.ops.session_pool.pool import PooledSessions, PoolWeights, Spans, gather_spans


def session_pool(
    tokens: Tensor, position: Tensor, cls: Tensor, weights: PoolWeights, spans: Spans
) -> PooledSessions:
    """See `hpgr_plugin.ops.session_pool.session_pool`; rows with the longest session first."""
    x, offsets = gather_spans(tokens, position, cls, spans)
    layout = segment_layout(offsets)
    x = x.index_select(0, layout.order)
    normed = weights.norm(x)
    queries = weights.queries_of(normed.index_select(0, layout.starts))
    means = first_token_attention(queries, normed, layout).transpose(0, 1)
    return PooledSessions(x.index_select(0, layout.starts), means, layout.segment_inverse)


def add_context(tokens: Tensor, context: Tensor, gate: Tensor, offsets: Tensor) -> Tensor:
    """See `hpgr_plugin.ops.session_pool.add_context`."""
    rms = tokens.detach().square().mean(1, keepdim=True).sqrt()
    # Not by indexing: the backward of an embedding adds up tokens in a fixed order on CUDA too.
    return tokens + gate * rms * F.embedding(segment_ids(offsets, len(tokens)), context)
