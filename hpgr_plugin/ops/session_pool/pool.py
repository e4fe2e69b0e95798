"""What sessions are pooled from, and what comes out."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hpgr_plugin.ops.jagged import complete_cumsum, lead_with, ranges, segment_ids


class Spans(NamedTuple):
    """Where each of S segments lies in the flat tokens: `starts` and `lengths`, int64 `[S]`."""

    starts: Tensor
    lengths: Tensor


class PoolWeights(NamedTuple):
    """Layer norm `[D]`, and the query and key projections of H heads of size d."""

    norm_weight: Tensor  # [D]
    norm_bias: Tensor  # [D]
    query: Tensor  # [H, d, D]
    query_bias: Tensor  # [H, d]
    key: Tensor  # [H, d, D]

    def norm(self, x: Tensor) -> Tensor:
        """Layer norm of `[S, D]`."""
        return F.layer_norm(x, x.shape[1:], self.norm_weight, self.norm_bias)

    def queries_of(self, normed: Tensor) -> Tensor:
        """Queries on normed tokens themselves, `[S, D]` to `[S, H, D]`, scaled."""
        q = torch.baddbmm(
            self.query_bias.unsqueeze(1),
            normed.expand(len(self.query), *normed.shape),
            self.query.transpose(1, 2),
        )
        return torch.bmm(q, self.key).transpose(0, 1) * q.shape[2] ** -0.5


class PooledSessions(NamedTuple):
    """One row per session, in an order that the backend chooses.

    Attributes:
        lead: `[S, D]`, the [CLS] token.
        means: `[H, S, D]`, the weighted means of the session's normed tokens.
        place: int64 `[S]`, the row of each session, or None where row s is session s.
    """

    lead: Tensor
    means: Tensor
    place: Tensor | None


def gather_spans(
    tokens: Tensor, position: Tensor, cls: Tensor, spans: Spans
) -> tuple[Tensor, Tensor]:
    """`[CLS]` and the tokens of every span, with their positions: `[L + S, D]`, `[S + 1]`."""
    index = ranges(*spans)
    offsets = complete_cumsum(spans.lengths)
    session = segment_ids(offsets, index.numel())
    place = index - spans.starts[session]
    x = tokens.index_select(0, index) + F.embedding(place, position)
    return lead_with(cls, x, offsets, session)
