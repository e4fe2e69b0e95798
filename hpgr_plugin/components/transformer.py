"""A small pre-norm transformer encoder over jagged segments, for SEM and MIM.

Everything but the attention itself runs on flat tokens `[T, D]`, without padding.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpgr_plugin.components.checks import check_at_least
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.ops.segments import SegmentLayout, first_token_attention, segment_attention
from hpgr_plugin.ops.session_pool import PoolWeights

INIT_STD = 0.02  # of every weight and of the item table, so that both start at the same scale


def embedding(num_rows: int, embedding_dim: int) -> nn.Embedding:
    """A table on the scale of the item table."""
    table = nn.Embedding(num_rows, embedding_dim)
    nn.init.normal_(table.weight, std=INIT_STD)
    return table


class HeadWeights(NamedTuple):
    """Norm and projections of a layer by head, H heads of size d.

    Attributes:
        pool: norm, query and key.
        value: `[H, d, D]`.
        value_bias: `[H, d]`.
    """

    pool: PoolWeights
    value: Tensor
    value_bias: Tensor


class EncoderLayer(nn.Module):
    """Pre-norm attention and a GELU feed-forward of width 4 D on flat tokens."""

    def __init__(self, *, embedding_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(embedding_dim)
        self.qkv = nn.Linear(embedding_dim, 3 * embedding_dim)
        self.attention_output = nn.Linear(embedding_dim, embedding_dim)
        self.feedforward_norm = nn.LayerNorm(embedding_dim)
        self.expand = nn.Linear(embedding_dim, 4 * embedding_dim)
        self.contract = nn.Linear(4 * embedding_dim, embedding_dim)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.qkv, self.attention_output, self.expand, self.contract):
            nn.init.normal_(linear.weight, std=INIT_STD)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, layout: SegmentLayout, read: Tensor | None = None) -> Tensor:
        """Tokens `[T, D]` in the layout's order -> `[T, D]`, or `[R, D]` of the rows `read`."""
        tokens, width = x.shape
        qkv = self.qkv(self.attention_norm(x))
        qkv = qkv.view(tokens, 3, self.num_heads, width // self.num_heads)
        attended = segment_attention(qkv, layout)
        if read is not None:
            x, attended = x.index_select(0, read), attended.index_select(0, read)
        return self._finish(x, attended)

    def first_tokens(self, x: Tensor, layout: SegmentLayout) -> Tensor:
        """`forward` for the first token of every segment, `[T, D]` -> `[S, D]`, longest first.

        The other tokens are only attended to, so they need no queries and no feed-forward, and by
        `PoolWeights.queries_of` and `finish_pooled` no keys and values either.
        """
        normed, weights = self.attention_norm(x), self.head_weights()
        queries = weights.pool.queries_of(normed.index_select(0, layout.starts))
        pooled = first_token_attention(queries, normed, layout)
        x = x.index_select(0, layout.starts)
        return self.finish_pooled(x, pooled.transpose(0, 1), weights)

    def head_weights(self) -> HeadWeights:
        """The weights by head; call it once per step, so that gradients are written once."""
        shape = (3, self.num_heads, -1)
        query, key, value = self.qkv.weight.view(*shape, self.qkv.in_features).unbind()
        query_bias, _, value_bias = self.qkv.bias.view(shape).unbind()
        norm = self.attention_norm
        pool = PoolWeights(norm.weight, norm.bias, query, query_bias, key)
        return HeadWeights(pool, value, value_bias)

    def finish_pooled(self, x: Tensor, pooled: Tensor, weights: HeadWeights) -> Tensor:
        """The layer's output for tokens whose attended tokens were averaged before projection.

        The value projection is linear, so it is applied once to each weighted mean.

        Args:
            x: `[S, D]`, the tokens that attend.
            pooled: `[H, S, D]`, the weighted means of the normed tokens they attend to.
            weights: from `head_weights`.

        Returns:
            `[S, D]`.
        """
        attended = torch.baddbmm(
            weights.value_bias.unsqueeze(1), pooled, weights.value.transpose(1, 2)
        )
        return self._finish(x, attended.transpose(0, 1).flatten(1))

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.dropout(self.attention_output(attended))
        hidden = F.gelu(self.expand(self.feedforward_norm(x)))
        return x + self.dropout(self.contract(hidden))


class JaggedEncoder(nn.Module):
    """A stack of pre-norm layers in which tokens attend inside their own segment only.

    Args:
        embedding_dim: D, a multiple of `num_heads`.
        num_heads: attention heads.
        num_layers: layers.
        dropout: in [0, 1).
        final_norm: whether the output is layer-normalised.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        num_heads: int,
        num_layers: int,
        dropout: float = 0.0,
        final_norm: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embedding_dim < 1 or embedding_dim % num_heads:
            raise HpgrError(
                f"embedding_dim must be a positive multiple of num_heads, "
                f"got embedding_dim {embedding_dim}, num_heads {num_heads}"
            )
        check_at_least(1, num_layers=num_layers)
        if not 0.0 <= dropout < 1.0:
            raise HpgrError(f"dropout must be in [0, 1), got {dropout}")
        self.layers = nn.ModuleList(
            EncoderLayer(embedding_dim=embedding_dim, num_heads=num_heads, dropout=dropout)
            for _ in range(num_layers)
        )
        self.final_norm = nn.LayerNorm(embedding_dim) if final_norm else nn.Identity()

    def forward(self, x: Tensor, layout: SegmentLayout, read: Tensor | None = None) -> Tensor:
        """Encode every segment.

        Args:
            x: `[T, D]`, tokens in the order of the offsets the layout was made from.
            layout: of the segments.
            read: int64 `[R]`, the tokens whose output is needed; the feed-forward of the last
                layer then runs for them only. None is all.

        Returns:
            `[T, D]` in the order of `x`, or `[R, D]` in that of `read`.
        """
        read = layout.inverse if read is None else layout.inverse[read]
        x = x.index_select(0, layout.order)
        for layer in self.layers[:-1]:
            x = layer(x, layout)
        return self.final_norm(self.layers[-1](x, layout, read))

    @property
    def first_layer(self) -> EncoderLayer:
        """The layer that reads the tokens themselves."""
        return cast(EncoderLayer, self.layers[0])

    def first_tokens(self, x: Tensor, layout: SegmentLayout) -> Tensor:
        """The output of `forward` for the first token of every segment, at less cost.

        Args:
            x: `[T, D]`, as in `forward`.
            layout: of segments that all have tokens, not causal.

        Returns:
            `[S, D]`, in the order of the offsets.
        """
        x = x.index_select(0, layout.order)
        for layer in self.layers[:-1]:
            x = layer(x, layout)
        x = cast(EncoderLayer, self.layers[-1]).first_tokens(x, layout)
        return self.final_norm(x).index_select(0, layout.segment_inverse)
