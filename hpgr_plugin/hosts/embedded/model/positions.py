"""The embedded host's own positions: what fills the slot when nothing is bound to it."""

from __future__ import annotations

from torch import Tensor, nn

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
        _history_timestamps: Tensor,
        candidate_embeddings: Tensor,
        *_: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Histories `[T, D]` and candidates `[C, D]` with their positions added."""
        rank = segment_positions(history_offsets, history_embeddings.shape[0])
        history = history_embeddings + self.table(rank + 1)
        return history, candidate_embeddings + self.table.weight[0]
