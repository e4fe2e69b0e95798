"""Wukong (arXiv 2403.02545): stacked factorisation machines over a few fields."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpgr_plugin.components.checks import check_at_least
from hpgr_plugin.hosts.embedded.model.rivals.interface import (
    RivalEncoder,
    RivalSizes,
    RivalTokens,
    perceptron,
    token_table,
)
from hpgr_plugin.ops.jagged import dense_to_jagged, jagged_to_padded_dense


class Wukong(RivalEncoder):
    """Fields user, candidate, mean history and attended history through `num_layers` layers.

    Args:
        sizes: see `RivalEncoder`.
        num_layers: layers.
        num_linear: n_L, fields that a layer makes by linear compression.
        num_factorised: n_F, fields that it makes by its factorisation machine.
        rank: k, columns that all fields' products are projected to.
        hidden_dim: of the perceptron behind the products.
    """

    def __init__(
        self,
        *,
        sizes: RivalSizes,
        num_layers: int = 3,
        num_linear: int = 16,
        num_factorised: int = 16,
        rank: int = 24,
        hidden_dim: int = 128,
    ) -> None:
        super().__init__(sizes=sizes)
        check_at_least(
            1,
            num_layers=num_layers,
            num_linear=num_linear,
            num_factorised=num_factorised,
            rank=rank,
            hidden_dim=hidden_dim,
        )
        self.user = token_table(1, sizes.embedding_dim)  # also where a log has no user features
        self.attended = AttentionPooling(sizes.embedding_dim)
        fields = [4, *[num_factorised + num_linear] * num_layers]
        self.layers = nn.ModuleList(
            WukongLayer(
                inputs,
                sizes.embedding_dim,
                num_linear=num_linear,
                num_factorised=num_factorised,
                rank=rank,
                hidden_dim=hidden_dim,
                dropout=sizes.dropout,
            )
            for inputs in fields[:-1]
        )
        self.output = nn.Linear(fields[-1] * sizes.embedding_dim, sizes.embedding_dim)

    def forward(self, tokens: RivalTokens) -> Tensor:
        """See `RivalEncoder.forward`."""
        user = (tokens.users() + self.user.weight)[tokens.index.candidate_users]
        fields = [user, tokens.candidates, tokens.visible_mean(), self.attended(tokens)]
        x = torch.stack([field.to(user.dtype) for field in fields], dim=1)
        for layer in self.layers:
            x = layer(x)
        output: Tensor = self.output(x.flatten(1))
        return output


class WukongLayer(nn.Module):
    """`LN([FMB(X); LCB(X)] + W_r X)` on fields `X` `[C, n, D]`."""

    def __init__(
        self,
        inputs: int,
        embedding_dim: int,
        *,
        num_linear: int,
        num_factorised: int,
        rank: int,
        hidden_dim: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.projection = nn.Linear(inputs, rank, bias=False)  # Y of X (X^T Y)
        self.products_norm = nn.LayerNorm(inputs * rank)
        self.mlp = perceptron(inputs * rank, hidden_dim, num_factorised * embedding_dim, dropout)
        self.compression = nn.Linear(inputs, num_linear, bias=False)
        self.residual = nn.Linear(inputs, num_linear + num_factorised, bias=False)
        self.norm = nn.LayerNorm(embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[C, n, D]` to `[C, n_F + n_L, D]`."""
        by_column = x.transpose(1, 2).contiguous()  # [C, D, n]
        products = torch.bmm(x, self.projection(by_column).to(x.dtype))  # [C, n, k]
        factorised = self.mlp(self.products_norm(products.flatten(1)))
        factorised = factorised.unflatten(1, (-1, x.shape[2]))
        linear = self.compression(by_column).transpose(1, 2)
        joined = torch.cat([factorised, linear.to(factorised.dtype)], dim=1)
        output: Tensor = self.norm(joined + self.residual(by_column).transpose(1, 2))
        return output


class AttentionPooling(nn.Module):
    """The visible history, averaged with the softmax of its products with the candidate."""

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(embedding_dim, embedding_dim, bias=False)

    def forward(self, tokens: RivalTokens) -> Tensor:
        """`[C, D]`; zero where nothing is visible."""
        history, candidates = tokens.padded_history(), tokens.padded_candidates()
        offsets, most = tokens.batch.candidate_offsets, candidates.shape[1]
        counts = tokens.index.visible.to(history.dtype).unsqueeze(1)
        counts = jagged_to_padded_dense(counts, offsets, most)  # [B, R, 1]
        seen = torch.arange(history.shape[1], device=counts.device) < counts  # [B, R, N]
        queries = self.query(candidates) * candidates.shape[2] ** -0.5
        scores = torch.bmm(queries.to(history.dtype), history.transpose(1, 2)).to(history.dtype)
        # Not -inf: the softmax of a row without anything to see must stay finite.
        weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(2) * seen
        pooled = torch.bmm(weights.to(history.dtype), history).to(history.dtype)
        return dense_to_jagged(pooled, offsets, len(tokens.candidates))
