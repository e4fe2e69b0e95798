"""DNN: the mean of the history, the candidate and the user through a perceptron."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from hpgr_plugin.components.checks import check_at_least
from hpgr_plugin.hosts.embedded.model.rivals.interface import RivalEncoder, RivalSizes, RivalTokens


class DNN(RivalEncoder):
    """An embedding and MLP model: it knows what is in the history, but no order.

    Args:
        sizes: see `RivalEncoder`.
        hidden_dim: width of the hidden layers.
        num_layers: hidden layers.
    """

    def __init__(self, *, sizes: RivalSizes, hidden_dim: int = 256, num_layers: int = 2) -> None:
        super().__init__(sizes=sizes)
        check_at_least(1, hidden_dim=hidden_dim, num_layers=num_layers)
        widths = [3 * sizes.embedding_dim, *[hidden_dim] * num_layers]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(sizes.dropout)]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden_dim, sizes.embedding_dim))

    def forward(self, tokens: RivalTokens) -> Tensor:
        """See `RivalEncoder.forward`."""
        output: Tensor = self.mlp(flat_features(tokens))
        return output


def flat_features(tokens: RivalTokens) -> Tensor:
    """User, mean of the visible history, and candidate side by side, `[C, 3 D]`."""
    user = tokens.users()[tokens.index.candidate_users]
    return torch.cat([user, tokens.visible_mean(), tokens.candidates], dim=1)
