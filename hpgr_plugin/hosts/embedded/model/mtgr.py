"""The MTGR layer (arXiv 2505.18654): layer norm by token domain, an MLP over gated attention.

The dynamic mask is in the tokens' orders, see `tokens.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpgr_plugin.hosts.embedded.model.hstu import EPSILON, SequenceLayer, take_rows
from hpgr_plugin.hosts.embedded.model.tokens import Domain
from hpgr_plugin.ops.hstu_attention import AttentionSpec, PositionTimeBias


class GroupLayerNorm(nn.Module):
    """Layer norm whose scale and shift belong to the token's domain."""

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(len(Domain), embedding_dim))
        self.bias = nn.Parameter(torch.zeros(len(Domain), embedding_dim))

    def forward(self, x: Tensor, domains: Tensor) -> Tensor:
        """`x` `[T, D]`, `domains` `[T]` to `[T, D]`."""
        normed = F.layer_norm(x, x.shape[-1:], eps=EPSILON)
        return normed * F.embedding(domains, self.weight) + F.embedding(domains, self.bias)


class MTGRLayer(SequenceLayer):
    """`X = MLP(GroupLN(V~ * U)) + X` with `V~ = SiLU(Q K^T) / N * mask * V`.

    Args:
        embedding_dim: D.
        num_heads: attention heads.
        dropout: on the MLP's output.
    """

    dynamic_mask = True
    takes_source = True

    def __init__(self, *, embedding_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__(embedding_dim=embedding_dim, num_heads=num_heads, dropout=dropout)
        self.input_norm = GroupLayerNorm(embedding_dim)
        self.uvqk = nn.Linear(embedding_dim, 4 * embedding_dim)
        self.gated_norm = GroupLayerNorm(embedding_dim)
        self.mlp = nn.Sequential(
            nn.Linear(embedding_dim, embedding_dim),
            nn.SiLU(),
            nn.Linear(embedding_dim, embedding_dim),
            nn.Dropout(dropout),
        )

    def forward(
        self,
        x: Tensor,
        *,
        domains: Tensor,
        spec: AttentionSpec,
        bias: PositionTimeBias | None,
        source: Tensor | None = None,
    ) -> Tensor:
        """See `SequenceLayer.forward`."""
        u, v, q, k = self.uvqk(self.input_norm(x, domains)).chunk(4, dim=-1)
        if source is not None:
            u, v, q, k, x = (take_rows(part, source) for part in (u, v, q, k, x))
            domains = domains[source]
        if spec.query_rows is not None:
            u, q, x = (part.index_select(0, spec.query_rows) for part in (u, q, x))
            domains = domains[spec.query_rows]
        return x + self.mlp(self.gated_norm(self.attend(q, k, v, spec, bias) * u, domains))
