"""The MTGR layer (arXiv 2505.18654): group layer norm by token domain, MLP over gated attention.

The dynamic mask is not here: it is written in the tokens' orders (see ``tokens.py``), which the
model sets by the encoder it drives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpgr_plugin.hosts.embedded.model.hstu import EPSILON, attend
from hpgr_plugin.hosts.embedded.model.padded import AttentionInputs, take_rows
from hpgr_plugin.hosts.embedded.model.tokens import Domain


class GroupLayerNorm(nn.Module):
    """Layer norm whose scale and shift belong to the token's domain."""

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(len(Domain), embedding_dim))
        self.bias = nn.Parameter(torch.zeros(len(Domain), embedding_dim))

    def forward(self, x: Tensor, domains: Tensor) -> Tensor:
        """``x [S, N, D]``, ``domains [S, N]`` -> ``[S, N, D]``."""
        normed = F.layer_norm(x, x.shape[-1:], eps=EPSILON)
        return normed * F.embedding(domains, self.weight) + F.embedding(domains, self.bias)


class MTGRLayer(nn.Module):
    """``X = MLP(GroupLN(V~ * U)) + X`` with ``V~ = SiLU(Q K^T) / N * mask * V``.

    Args:
        embedding_dim: ``D``.
        num_heads: attention heads.
        dropout: on the MLP's output.
    """

    def __init__(self, *, embedding_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
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
        attention: AttentionInputs,
        bias: Tensor | None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """``x [S, N, D]`` -> ``[S, N, D]``, or ``[S, R, D]`` for the query rows ``rows [S, R]``."""
        u, v, q, k = self.uvqk(self.input_norm(x, domains)).chunk(4, dim=-1)
        if rows is not None:
            u, q, x = (take_rows(part, rows) for part in (u, q, x))
            domains = domains.gather(1, rows)
        mixed = attend(q, k, v, num_heads=self.num_heads, attention=attention, bias=bias)
        return x + self.mlp(self.gated_norm(mixed * u, domains))
