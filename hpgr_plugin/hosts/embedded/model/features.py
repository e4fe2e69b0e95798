"""Side features: a token for each user feature, and the statistics of a candidate."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hpgr_plugin.components.transformer import embedding


class UserFeatureTokens(nn.Module):
    """One context token a feature and user.

    Args:
        num_values: feature name -> number of codes.
        embedding_dim: ``D``.
    """

    def __init__(self, num_values: Mapping[str, int], embedding_dim: int) -> None:
        super().__init__()
        self.tables = nn.ModuleDict(
            {name: embedding(size, embedding_dim) for name, size in sorted(num_values.items())}
        )

    @property
    def tokens_per_user(self) -> int:
        return len(self.tables)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Codes ``[B]`` a feature -> ``[B * tokens_per_user, D]``, user by user."""
        missing = [name for name in self.tables if name not in features]
        if missing:
            raise ValueError(f"user_features lacks {missing}; the batch has {sorted(features)}")
        columns = [table(features[name]) for name, table in self.tables.items()]
        return torch.stack(columns, dim=1).flatten(0, 1)


class ItemOdds(nn.Module):
    """A logit linear in the log odds of a candidate's item before its time; it starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """The columns of `CandidateStatistics`, ``[C]`` each -> ``[C]``."""
        odds = log_odds(features, "item").to(self.linear.weight.dtype)
        logits: Tensor = self.linear(odds.unsqueeze(1)).squeeze(1)
        return logits


class OddsNetwork(nn.Module):
    """An embedding of the log odds of a candidate's item and user before its time.

    The counts stay out: they grow along the log, so in the test split they lie beyond training.

    Args:
        embedding_dim: ``D``.
    """

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim)
        )

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """The columns of `CandidateStatistics`, ``[C]`` each -> ``[C, D]``."""
        odds = torch.stack([log_odds(features, owner) for owner in ("item", "user")], dim=1)
        embedded: Tensor = self.layers(odds.to(next(self.parameters()).dtype))
        return embedded


def log_odds(features: Mapping[str, Tensor], owner: str, *, prior_events: float = 5.0) -> Tensor:
    """Log odds of a like ``[C]``, pulled towards even odds by imaginary events.

    Args:
        features: the columns of `CandidateStatistics`.
        owner: "item" or "user".
        prior_events: how many; with them a single like says less than a hundred.
    """
    count, likes, half = features[f"{owner}_count"], features[f"{owner}_likes"], prior_events / 2
    return ((likes + half) / (count - likes + half)).log()
