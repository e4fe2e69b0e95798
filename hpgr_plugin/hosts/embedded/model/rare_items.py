"""Embeddings of items that training saw rarely or never."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpgr_plugin.components.checks import check_at_least
from hpgr_plugin.components.item_features import gated
from hpgr_plugin.components.transformer import embedding
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.embedded.model.token_features import FeatureSizes


class RareItems(nn.Module):
    """A row [UNK] for unseen items, and a gate between an item's own row and its features.

    Training replaces an item of n training events by [UNK] with probability `tau / (tau + n)`, so
    that the row learns what rare items are like. Items without any training event always have it.

    With `gate_tau`, an item is `g row + (1 - g) features` with `g = n / (n + gate_tau)`, in place
    of the sum of both: its features speak for it until its own row has been trained.

    Args:
        sizes: of the ranker and its data.
        tau: of the replacement, in events; 0 replaces only items without events.
        gate_tau: events at which row and features weigh the same; 0 leaves the sum.

    Raises:
        HpgrError: an argument out of its range, no counts, or a gate without item features.
    """

    def __init__(self, *, sizes: FeatureSizes, tau: float = 1.0, gate_tau: float = 0.0) -> None:
        super().__init__()
        check_at_least(0, tau=tau, gate_tau=gate_tau)
        if sizes.item_counts is None:
            raise HpgrError("hpgr.RareItems needs item_counts, the training events of every item")
        if gate_tau > 0 and not sizes.item_feature_codes:
            raise HpgrError("hpgr.RareItems.gate_tau must be 0 for a log without item features")
        self.tau = tau
        self.gate_tau = gate_tau
        self.unknown_table = embedding(1, sizes.embedding_dim)
        self.counts: Tensor
        self.register_buffer("counts", sizes.item_counts.long(), persistent=False)

    @property
    def replaces_features(self) -> bool:
        """Whether the rows hold the item features already."""
        return self.gate_tau > 0

    def forward(self, rows: Tensor, items: Tensor, features: Tensor | None) -> Tensor:
        """The embeddings of items.

        Args:
            rows: `[L, D]`, of the item table.
            items: int64 `[L]`.
            features: `[L, D]`, of the items' features, or None.

        Returns:
            `[L, D]`.
        """
        counts = self.counts[items]
        unknown = counts == 0
        if self.training and self.tau > 0:
            drop = self.tau / (self.tau + counts)
            unknown = unknown | (torch.rand_like(drop) < drop)
        rows = torch.where(unknown.unsqueeze(1), self.unknown_table.weight, rows)
        if self.gate_tau == 0 or features is None:
            return rows
        return gated(rows, features, counts, self.gate_tau)
