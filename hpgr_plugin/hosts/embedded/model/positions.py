"""The embedded host's own positions: what fills the slot when nothing is bound to it."""

from __future__ import annotations

from torch import Tensor, nn

from hpgr_plugin.ops.jagged import segment_positions


class LearnedPositionalEncoder(nn.Module):
    """Adds a learned vector by rank to the history, and one of its own to every candidate.

    The signature is that of :class:`TimeAwarePositionalEncoder`; the times
    are not read.

    Args:
        embedding_dim: ``D``.
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
        candidate_offsets: Tensor,
        candidate_timestamps: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """``[T, D]`` history and ``[C, D]`` candidates, with their positions added."""
        del history_timestamps, candidate_offsets, candidate_timestamps
        rank = segment_positions(history_offsets, history_embeddings.shape[0])
        history = history_embeddings + self.table(rank + 1)
        return history, candidate_embeddings + self.table.weight[0]
