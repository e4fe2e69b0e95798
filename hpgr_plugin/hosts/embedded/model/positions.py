"""The embedded host's own positions: what fills the slot when nothing is bound to it."""

from __future__ import annotations

from torch import Tensor, nn

from hpgr_plugin.components.positions import PositionPlan
from hpgr_plugin.ops.jagged import segment_positions


class LearnedPositionalEncoder(nn.Module):
    """Adds a learned vector by rank to the history, and one of its own to every candidate.

    It takes what `TimeAwarePositionalEncoder` takes, and does not read the times.

    Args:
        embedding_dim: D.
        max_positions: longest history.
    """

    def __init__(self, *, embedding_dim: int, max_positions: int) -> None:
        super().__init__()
        self.table = nn.Embedding(max_positions + 1, embedding_dim)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(
        self,
        history_embeddings: Tensor,
        history_offsets: Tensor,
        history_timestamps: Tensor,
        candidate_embeddings: Tensor,
        *_: Tensor,
        plan: PositionPlan | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Histories `[T, D]` and candidates `[C, D]` with their positions added."""
        if plan is None:
            plan = self.plan(history_offsets, history_timestamps)
        history = history_embeddings + self.table(plan.history)
        return history, candidate_embeddings + self.table.weight[0]

    def plan(self, history_offsets: Tensor, history_timestamps: Tensor, *_: Tensor) -> PositionPlan:
        """The rows of the table; candidates all have row 0."""
        return PositionPlan(segment_positions(history_offsets, len(history_timestamps)) + 1, None)
