"""SEM's two passes as loops over sessions: the reference."""

import torch
from torch import Tensor

from hpgr_plugin.ops.session_pool.pool import PooledSessions, PoolWeights, Spans


def session_pool(
    tokens: Tensor, position: Tensor, cls: Tensor, weights: PoolWeights, spans: Spans
) -> PooledSessions:
    """Attention of [CLS] over its session, head by head, on keys projected one by one."""
    num_heads, head_dim, _ = weights.query.shape
    means = [tokens.new_zeros(num_heads, 0, tokens.shape[1])]
    for start, length in zip(spans.starts.tolist(), spans.lengths.tolist(), strict=True):
        items = [tokens[start + i] + position[i] for i in range(length)]
        normed = weights.norm(torch.stack([cls, *items]))
        heads = []
        for h in range(num_heads):
            query = weights.query[h] @ normed[0] + weights.query_bias[h]
            keys = normed @ weights.key[h].T
            attention = (keys @ query / head_dim**0.5).softmax(0)
            heads.append(attention @ normed)
        means.append(torch.stack(heads)[:, None])
    return PooledSessions(cls.expand(len(spans.starts), -1), torch.cat(means, 1), None)


def add_context(tokens: Tensor, context: Tensor, gate: Tensor, offsets: Tensor) -> Tensor:
    """`h + gate * rms(h) * context_s`, token by token."""
    rows = [tokens[:0]]
    for s in range(len(context)):
        for h in tokens[int(offsets[s]) : int(offsets[s + 1])]:
            rms = h.detach().square().mean().sqrt()
            rows.append((h + gate * rms * context[s])[None])
    return torch.cat(rows)
