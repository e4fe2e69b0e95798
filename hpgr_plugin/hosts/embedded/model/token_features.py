"""What else a token may say: when it happened, and how long after the one before.

A `TokenFeatures` adds vectors to the tokens of history and candidates. Any number of them is bound,
as classes: `hpgr.HSTURanker.token_features = [@hpgr.CalendarFeatures, @hpgr.GapFeatures]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hpgr_plugin.components.checks import check_at_least
from hpgr_plugin.components.transformer import embedding
from hpgr_plugin.data.batch import Batch
from hpgr_plugin.hosts.embedded.model.tokens import RequestIndex

_HOUR, _DAY = 3600, 86400
_FIRST_WEEKDAY = 3  # 1970-01-01 was a Thursday; 0 is Monday


@dataclass(frozen=True, kw_only=True)
class FeatureSizes:
    """What the ranker knows of the data.

    Attributes:
        embedding_dim: D.
        num_actions: distinct history actions.
        item_feature_codes: item feature name -> `[V]` codes.
        item_counts: int64 `[V]`, training events of every item; None where nothing counted them.
    """

    embedding_dim: int
    num_actions: int
    item_feature_codes: Mapping[str, Tensor] = field(default_factory=dict)
    item_counts: Tensor | None = None


class Added(NamedTuple):
    """What is added to the tokens; None adds nothing.

    Attributes:
        history: `[T, D]`.
        candidates: `[C, D]`.
    """

    history: Tensor | None
    candidates: Tensor | None


class TokenFeatures(nn.Module):
    """The interface of an entry of `hpgr.HSTURanker.token_features`, which takes subclasses.

    Args:
        sizes: of the ranker and its data.
    """

    def __init__(self, *, sizes: FeatureSizes) -> None:
        super().__init__()

    def forward(self, batch: Batch, index: RequestIndex) -> Added:
        """Vectors on the scale of the item table; the ranker scales tokens by sqrt(D).

        A candidate's vector may read only what the candidate sees: the first `index.visible` items
        of its history. A history item's may read only the items before it.
        """
        raise NotImplementedError


class CalendarFeatures(TokenFeatures):
    """The hour of the day and the day of the week (UTC) of every event.

    Args:
        sizes: see `TokenFeatures`.
        utc_offset_hours: of the log's local time, to be added.
    """

    def __init__(self, *, sizes: FeatureSizes, utc_offset_hours: float = 0.0) -> None:
        super().__init__(sizes=sizes)
        self.utc_offset_seconds = round(utc_offset_hours * _HOUR)
        self.hour_table = embedding(24, sizes.embedding_dim)
        self.weekday_table = embedding(7, sizes.embedding_dim)

    def forward(self, batch: Batch, index: RequestIndex) -> Added:
        """See `TokenFeatures.forward`."""
        return Added(self._of(batch.history_timestamps), self._of(batch.candidate_timestamps))

    def _of(self, timestamps: Tensor) -> Tensor:
        local = timestamps + self.utc_offset_seconds
        hour = torch.div(local, _HOUR, rounding_mode="floor") % 24
        weekday = (torch.div(local, _DAY, rounding_mode="floor") + _FIRST_WEEKDAY) % 7
        added: Tensor = self.hour_table(hour) + self.weekday_table(weekday)
        return added


class GapFeatures(TokenFeatures):
    """The time since the item before, in buckets of log seconds.

    For a candidate the item before is the last one that it sees.

    Args:
        sizes: see `TokenFeatures`.
        buckets_per_octave: buckets for each doubling of the time.
    """

    _OCTAVES = 32  # up to 136 years

    def __init__(self, *, sizes: FeatureSizes, buckets_per_octave: int = 2) -> None:
        super().__init__(sizes=sizes)
        check_at_least(1, buckets_per_octave=buckets_per_octave)
        self.buckets_per_octave = buckets_per_octave
        # Row 0: there is no item before.
        self.gap_table = embedding(1 + self._OCTAVES * buckets_per_octave, sizes.embedding_dim)

    def forward(self, batch: Batch, index: RequestIndex) -> Added:
        """See `TokenFeatures.forward`."""
        times = batch.history_timestamps
        if not len(times):
            nothing = torch.zeros_like(batch.candidate_items)
            return Added(None, self.gap_table(nothing))
        starts = batch.history_offsets[:-1][index.candidate_users]
        last = (starts + index.visible - 1).clamp(min=0)
        return Added(
            self._of(times - times.roll(1), index.history_ranks > 0),
            self._of(batch.candidate_timestamps - times[last], index.visible > 0),
        )

    def _of(self, gaps: Tensor, known: Tensor) -> Tensor:
        octaves = torch.log2(1.0 + gaps.clamp(min=0).double())
        bucket = 1 + (octaves * self.buckets_per_octave).long()
        bucket = bucket.clamp(max=self.gap_table.num_embeddings - 1)
        added: Tensor = self.gap_table(torch.where(known, bucket, 0))
        return added
