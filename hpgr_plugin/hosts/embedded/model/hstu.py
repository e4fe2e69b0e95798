"""The HSTU layer: pointwise SiLU attention, gated by U (HSTU paper, Eq. 1 to 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpgr_plugin.ops.hstu_attention import AttentionSpec, PositionTimeBias, hstu_attention

# Attention is divided by the full length: what a short history gives is small before its norm.
EPSILON = 1e-6


class SequenceLayer(nn.Module):
    """The interface of an encoder layer; `hpgr.HSTURanker.layer` takes a subclass.

    Attributes:
        dynamic_mask: whether the history that every candidate may see is fully connected (MTGR)
            instead of causal.
        takes_source: whether `forward` takes `source`, so that what tokens share is computed once.
    """

    dynamic_mask: bool = False
    takes_source: bool = False

    def __init__(self, *, embedding_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(
        self, x: Tensor, *, domains: Tensor, spec: AttentionSpec, bias: PositionTimeBias | None
    ) -> Tensor:
        """Encode the tokens.

        Args:
            x: `[T, D]`.
            domains: int64 `[T]`, a `Domain` each.
            spec: sequences and visibility; with `query_rows`, only those rows are computed.
            bias: of this layer, or None.

        A layer with `takes_source` also takes `source`, int64 `[T]` or None: token t is then row
        `source[t]` of `x` and of `domains`, which hold every distinct token once.

        Returns:
            `[T, D]`, or `[Tq, D]`.
        """
        raise NotImplementedError

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, bias: PositionTimeBias | None
    ) -> Tensor:
        """Attention of `num_heads` heads: q `[Tq, D]`, k and v `[T, D]` to `[Tq, D]`."""
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in (q, k, v))
        return hstu_attention(q, k, v, spec, bias=bias).flatten(1)


class HSTULayer(SequenceLayer):
    """`Y = f(LN(attention) * U) + X` with `U, V, Q, K = SiLU(f(LN(X)))`.

    Args:
        embedding_dim: D; also the width of U, V, Q and K over all heads.
        num_heads: attention heads.
        dropout: on the gated output.
    """

    takes_source = True

    def __init__(self, *, embedding_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__(embedding_dim=embedding_dim, num_heads=num_heads, dropout=dropout)
        self.input_norm = nn.LayerNorm(embedding_dim, eps=EPSILON)
        self.uvqk = nn.Linear(embedding_dim, 4 * embedding_dim)
        self.attention_norm = nn.LayerNorm(embedding_dim, eps=EPSILON)
        self.output = nn.Linear(embedding_dim, embedding_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        *,
        domains: Tensor,
        spec: AttentionSpec,
        bias: PositionTimeBias | None,
        source: Tensor | None = None,
    ) -> Tensor:
        """See `SequenceLayer.forward`; every domain is treated alike."""
        normed = self.input_norm(x)
        if spec.query_rows is None:
            u, v, q, k = F.silu(self.uvqk(normed)).chunk(4, dim=-1)
            if source is not None:
                u, v, q, k, x = (take_rows(part, source) for part in (u, v, q, k, x))
        else:
            u, v, q, k = self._uvqk_for_rows(normed, spec.query_rows)
            x = x.index_select(0, spec.query_rows)
        gated = self.attention_norm(self.attend(q, k, v, spec, bias)) * u
        return x + self.output(self.dropout(gated))

    def _uvqk_for_rows(self, normed: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        """Queries and gates of `rows` only; keys and values of every token."""
        weight, offset = self.uvqk.weight.chunk(4), self.uvqk.bias.chunk(4)
        chosen = normed.index_select(0, rows)
        u, q = (F.silu(F.linear(chosen, weight[i], offset[i])) for i in (0, 2))
        v, k = (F.silu(F.linear(normed, weight[i], offset[i])) for i in (1, 3))
        return u, v, q, k


def initialise_linear(module: nn.Module) -> None:
    """Xavier weights and zero biases for every linear layer below `module`."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            if child.bias is not None:
                torch.nn.init.zeros_(child.bias)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """`x[rows]` for rows `[R]` that repeat; the gradient adds up what a row was taken for."""
    return x.index_select(0, rows) if x.is_cuda else F.embedding(rows, x)
