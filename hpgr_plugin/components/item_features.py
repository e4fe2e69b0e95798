"""Embeddings of an item's features, and how much they speak for an item that is rare."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hpgr_plugin.components.transformer import embedding


class ItemFeatures(nn.Module):
    """The summed embeddings of an item's categorical features.

    Args:
        codes: feature name -> `[V]` int64 code of every item.
        embedding_dim: D.
    """

    def __init__(self, codes: Mapping[str, Tensor], embedding_dim: int) -> None:
        super().__init__()
        self.names = sorted(codes)
        self.tables = nn.ModuleDict()
        for name in self.names:
            values = codes[name].long()
            self.tables[name] = embedding(int(values.max()) + 1, embedding_dim)
            self.register_buffer(f"codes_{name}", values, persistent=False)

    def forward(self, items: Tensor) -> Tensor:
        """Items `[L]` -> `[L, D]`."""
        parts = [self.tables[name](getattr(self, f"codes_{name}")[items]) for name in self.names]
        return torch.stack(parts).sum(0)


def gated(rows: Tensor, features: Tensor, counts: Tensor, tau: float) -> Tensor:
    """`g rows + (1 - g) features` with `g = n / (n + tau)`, `[L, D]`.

    Args:
        rows: `[L, D]`, of the item table.
        features: `[L, D]`, of the same items.
        counts: int64 `[L]`, n, the training events of each item.
        tau: above 0, events at which both weigh the same.
    """
    gate = (counts / (counts + tau)).to(rows.dtype).unsqueeze(1)
    return gate * rows + (1 - gate) * features
