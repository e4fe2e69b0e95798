"""MoE: the inputs of the DNN through experts that a softmax gate mixes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpgr_plugin.components.checks import check_at_least
from hpgr_plugin.hosts.embedded.model.rivals.dnn import flat_features
from hpgr_plugin.hosts.embedded.model.rivals.interface import (
    RivalEncoder,
    RivalSizes,
    RivalTokens,
    perceptron,
)


class MoE(RivalEncoder):
    """`sum_k softmax(W x)_k expert_k(x)`: all experts run, the gate weighs them (dense).

    Args:
        sizes: see `RivalEncoder`.
        num_experts: perceptrons.
        hidden_dim: hidden width of each.
    """

    def __init__(self, *, sizes: RivalSizes, num_experts: int = 8, hidden_dim: int = 128) -> None:
        super().__init__(sizes=sizes)
        check_at_least(1, num_experts=num_experts, hidden_dim=hidden_dim)
        self.gate = nn.Linear(3 * sizes.embedding_dim, num_experts)
        self.experts = nn.ModuleList(
            perceptron(3 * sizes.embedding_dim, hidden_dim, sizes.embedding_dim, sizes.dropout)
            for _ in range(num_experts)
        )

    def forward(self, tokens: RivalTokens) -> Tensor:
        """See `RivalEncoder.forward`."""
        inputs = flat_features(tokens)
        outputs = torch.stack([expert(inputs) for expert in self.experts], dim=1)  # [C, K, D]
        shares = self.gate(inputs).softmax(1).to(outputs.dtype)
        return torch.einsum("ck,ckd->cd", shares, outputs)
