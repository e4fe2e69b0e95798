"""MoE: the inputs of the DNN through experts that a softmax gate mixes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpgr_plugin.components.checks import check_at_least
from hpgr_plugin.hosts.embedded.model.rivals.dnn import flat_features
from hpgr_plugin.hosts.embedded.model.rivals.interface import RivalEncoder, RivalTokens, perceptron


class MoE(RivalEncoder):
    """`sum_k softmax(W x)_k expert_k(x)`: all experts run, the gate weighs them (dense).

    Args:
        embedding_dim, num_heads, dropout, max_history: see `RivalEncoder`.
        num_experts: perceptrons.
        hidden_dim: hidden width of each.
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        num_heads: int,
        dropout: float,
        max_history: int,
        num_experts: int = 8,
        hidden_dim: int = 128,
    ) -> None:
        super().__init__(
            embedding_dim=embedding_dim,
            num_heads=num_heads,
            dropout=dropout,
            max_history=max_history,
        )
        check_at_least(1, num_experts=num_experts, hidden_dim=hidden_dim)
        self.gate = nn.Linear(3 * embedding_dim, num_experts)
        self.experts = nn.ModuleList(
            perceptron(3 * embedding_dim, hidden_dim, embedding_dim, dropout)
            for _ in range(num_experts)
        )

    def forward(self, tokens: RivalTokens) -> Tensor:
        """See `RivalEncoder.forward`."""
        inputs = flat_features(tokens)
        outputs = torch.stack([expert(inputs) for expert in self.experts], dim=1)  # [C, K, D]
        shares = self.gate(inputs).softmax(1).to(outputs.dtype)
        return torch.einsum("ck,ckd->cd", shares, outputs)
