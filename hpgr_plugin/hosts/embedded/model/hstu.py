"""The HSTU layer: pointwise SiLU attention, gated by U (HSTU paper, Eq. 1 to 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpgr_plugin.hosts.embedded.model.attention import pointwise_attention
from hpgr_plugin.hosts.embedded.model.padded import AttentionInputs, take_rows

# Attention is divided by the full length: what a short history gives is small before its norm.
EPSILON = 1e-6


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_heads: int,
    attention: AttentionInputs,
    bias: Tensor | None,
) -> Tensor:
    """Attention of ``num_heads`` heads: q ``[S, Q, D]``, k and v ``[S, K, D]`` -> ``[S, Q, D]``."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    mixed = pointwise_attention(
        q,
        k,
        v,
        bias=bias,
        visible=attention.visible,
        weights=attention.weights,
        alpha=q.shape[-1] ** -0.5,
        norm_length=attention.norm_length,
        mask_position=attention.mask_position,
    )
    return mixed.transpose(1, 2).flatten(2)


class HSTULayer(nn.Module):
    """``Y = f(LN(attention) * U) + X`` with ``U, V, Q, K = SiLU(f(LN(X)))``.

    Args:
        embedding_dim: ``D``; also the width of U, V, Q and K over all heads.
        num_heads: attention heads.
        dropout: on the gated output.
    """

    def __init__(self, *, embedding_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
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
        attention: AttentionInputs,
        bias: Tensor | None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """``x [S, N, D]`` -> ``[S, N, D]``, or ``[S, R, D]`` for the query rows ``rows [S, R]``.

        ``attention`` and ``bias`` are those of the query rows.
        """
        del domains  # the same for every token here; MTGR's layer reads it
        normed = self.input_norm(x)
        if rows is None:
            u, v, q, k = F.silu(self.uvqk(normed)).chunk(4, dim=-1)
        else:
            u, v, q, k = self._uvqk_for_rows(normed, rows)
            x = take_rows(x, rows)
        mixed = attend(q, k, v, num_heads=self.num_heads, attention=attention, bias=bias)
        gated = self.attention_norm(mixed) * u
        return x + self.output(self.dropout(gated))

    def _uvqk_for_rows(self, normed: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        """Queries and gates of ``rows`` alone; keys and values of every token."""
        weight = self.uvqk.weight.chunk(4)
        offset = self.uvqk.bias.chunk(4)
        chosen = take_rows(normed, rows)
        u, q = (F.silu(F.linear(chosen, weight[i], offset[i])) for i in (0, 2))
        v, k = (F.silu(F.linear(normed, weight[i], offset[i])) for i in (1, 3))
        return u, v, q, k


def initialise_linear(module: nn.Module) -> None:
    """Xavier weights and zero biases for every linear layer below ``module``."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            if child.bias is not None:
                torch.nn.init.zeros_(child.bias)
