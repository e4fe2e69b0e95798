"""MTGR's cross features: what the user did with things like this candidate, before its time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpgr_plugin.data.batch import Batch
from hpgr_plugin.hosts.embedded.model.token_features import Added, FeatureSizes, TokenFeatures
from hpgr_plugin.hosts.embedded.model.tokens import RequestIndex
from hpgr_plugin.ops.jagged import ranges


class CrossFeatures(TokenFeatures):
    """Counts and means over the visible history, added to the candidate's token.

    Over all visible items, over those that are the candidate's item, and over those that share a
    feature with it (one group per item feature): how many, as `log(1 + n)`, and how the user acted
    on them, as the share of every action. With two actions, liked or not, that is the mean like.

    Args:
        sizes: see `TokenFeatures`.
    """

    def __init__(self, *, sizes: FeatureSizes) -> None:
        super().__init__(sizes=sizes)
        self.num_actions = sizes.num_actions
        self.names = sorted(sizes.item_feature_codes)
        for name in self.names:
            codes = sizes.item_feature_codes[name].long()
            self.register_buffer(f"codes_{name}", codes, persistent=False)
        groups = 2 + len(self.names)
        self.projection = nn.Linear(groups * (1 + sizes.num_actions), sizes.embedding_dim)
        nn.init.normal_(self.projection.weight, std=0.02)
        nn.init.zeros_(self.projection.bias)

    def forward(self, batch: Batch, index: RequestIndex) -> Added:
        """See `TokenFeatures.forward`."""
        statistics = self.statistics(batch, index)
        return Added(None, self.projection(statistics.to(self.projection.weight.dtype)))

    def statistics(self, batch: Batch, index: RequestIndex) -> Tensor:
        """`[C, groups * (1 + num_actions)]`: log count and shares of the actions, by group."""
        starts = batch.history_offsets[:-1][index.candidate_users]
        rows = ranges(starts, index.visible, index.num_visible)
        owner = torch.arange(batch.num_candidates, device=rows.device)
        owner = owner.repeat_interleave(index.visible, output_size=len(rows))
        items, candidates = batch.history_items[rows], batch.candidate_items[owner]
        groups = [torch.ones_like(items, dtype=torch.bool), items == candidates]
        for name in self.names:
            codes: Tensor = self.get_buffer(f"codes_{name}")
            groups.append(codes[items] == codes[candidates])
        cell = owner * self.num_actions + batch.history_actions[rows]
        columns = [self._of_group(cell, group, batch.num_candidates) for group in groups]
        return torch.cat(columns, dim=1)

    def _of_group(self, cell: Tensor, group: Tensor, num_candidates: int) -> Tensor:
        # Not bincount of cell[group], which waits for the device; below 2^24 floats count exactly.
        counts = torch.zeros(num_candidates * self.num_actions, device=cell.device)
        counts = counts.index_add(0, cell, group.float())
        counts = counts.view(num_candidates, self.num_actions)
        total = counts.sum(1, keepdim=True)
        return torch.cat([total.log1p(), F.normalize(counts, p=1.0, dim=1)], dim=1)
