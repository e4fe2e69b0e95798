"""What a rival gets and returns, and the parts that several of them use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpgr_plugin.components.transformer import JaggedEncoder
from hpgr_plugin.data.batch import Batch
from hpgr_plugin.hosts.embedded.model.tokens import RequestIndex
from hpgr_plugin.ops.jagged import complete_cumsum, jagged_to_padded_dense


@dataclass(frozen=True)
class RivalTokens:
    """The embedded tokens of B requests, T history items and C candidates.

    Attributes:
        batch: the requests.
        index: whose they are, and how many items each candidate may see: the first
            `index.visible` `[C]` of its user's history.
        history: `[T, D]`, item, action and features.
        candidates: `[C, D]`, item and features.
        context: `[B, F, D]`, one for each user feature, or None.
        plan: what the rival's `plan` made of these requests; None: it is made where it is read.
    """

    batch: Batch
    index: RequestIndex
    history: Tensor
    candidates: Tensor
    context: Tensor | None
    plan: Any = None

    def padded_history(self) -> Tensor:
        """`[B, N, D]`, zeros behind the end of each history."""
        offsets = self.batch.history_offsets
        return jagged_to_padded_dense(self.history, offsets, self.index.longest_history)

    def padded_candidates(self) -> Tensor:
        """`[B, R, D]`, zeros behind the last candidate of each request."""
        offsets = self.batch.candidate_offsets
        return jagged_to_padded_dense(self.candidates, offsets, self.index.most_candidates)

    def users(self) -> Tensor:
        """The summed user features `[B, D]`, zeros where there are none."""
        if self.context is None:
            return self.history.new_zeros(self.batch.num_requests, self.history.shape[1])
        return self.context.sum(1)

    def visible_mean(self) -> Tensor:
        """The mean of the history tokens that each candidate sees, `[C, D]`; of none, zero."""
        sums = F.pad(self.padded_history().cumsum(1), (0, 0, 1, 0))
        total = sums.flatten(0, 1).index_select(0, self.place_of_last_visible(sums.shape[1]))
        return total / self.index.visible.clamp(min=1).unsqueeze(1)

    def place_of_last_visible(self, width: int) -> Tensor:
        """Where each candidate reads rows of `width` slots that begin with a start slot, `[C]`."""
        return self.index.candidate_users * width + self.index.visible

    def with_start(self, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Histories that begin with one more token, which stands for an empty history.

        Args:
            start: `[B, D]`.

        Returns:
            Tokens `[T + B, D]`, offsets `[B + 1]`, and for each candidate the row of the last
            token that it sees, `[C]`.
        """
        offsets = offsets_with_start(self.batch)
        values = self.history.new_empty(len(self.history) + len(start), self.history.shape[1])
        rows = torch.arange(len(self.history), device=offsets.device) + self.index.history_users + 1
        values = values.index_copy(0, offsets[:-1], start.to(values.dtype))
        values = values.index_copy(0, rows, self.history)
        return values, offsets, offsets[:-1][self.index.candidate_users] + self.index.visible


@dataclass(frozen=True, kw_only=True)
class RivalSizes:
    """The sizes of the ranker, which its encoder follows.

    Attributes:
        embedding_dim: D.
        num_heads: attention heads, for those that have any.
        dropout: inside the encoder.
        max_history: longest history.
    """

    embedding_dim: int
    num_heads: int
    dropout: float
    max_history: int


class RivalEncoder(nn.Module):
    """The interface of `hpgr.HSTURanker.encoder`, which takes a subclass.

    Args:
        sizes: of the ranker; a subclass adds arguments of its own, with defaults.
    """

    def __init__(self, *, sizes: RivalSizes) -> None:
        super().__init__()

    def plan(
        self,
        batch: Batch,
        index: RequestIndex,
        *,
        context_len: int,
        device_type: str | None = None,
    ) -> Any:
        """Index arithmetic that `forward` finds in `tokens.plan`: nested tuples of tensors.

        Args:
            batch: the requests, on the host or on the device.
            index: of the same requests.
            context_len: user features.
            device_type: see `segment_layout`.
        """
        return None

    def plan_of(self, tokens: RivalTokens) -> Any:
        """The plan of these tokens, made here if nobody has."""
        if tokens.plan is not None:
            return tokens.plan
        context_len = 0 if tokens.context is None else tokens.context.shape[1]
        return self.plan(tokens.batch, tokens.index, context_len=context_len)

    def forward(self, tokens: RivalTokens) -> Tensor:
        """A representation of every candidate, `[C, D]`; the ranker's head makes its logit."""
        raise NotImplementedError


class Match(nn.Module):
    """`MLP([state, item, state * item])`: how sequence models score a candidate."""

    def __init__(self, embedding_dim: int, dropout: float) -> None:
        super().__init__()
        self.mlp = perceptron(3 * embedding_dim, embedding_dim, embedding_dim, dropout)

    def forward(self, state: Tensor, item: Tensor) -> Tensor:
        """`[C, D]` and `[C, D]` to `[C, D]`."""
        output: Tensor = self.mlp(torch.cat([state, item, state * item], dim=1))
        return output


class TransformerRival(RivalEncoder):
    """A transformer over histories with places and one more token; its states meet candidates.

    Args:
        sizes: see `RivalEncoder`.
        num_layers: attention layers.

    Attributes:
        extra_token: the name of the learned token, also in checkpoints.
        extra_places: so many more than items of the longest history.
    """

    extra_token: str
    extra_places: int

    def __init__(self, *, sizes: RivalSizes, num_layers: int = 2) -> None:
        super().__init__(sizes=sizes)
        self.add_module(self.extra_token, token_table(1, sizes.embedding_dim))
        self.positions = token_table(sizes.max_history + self.extra_places, sizes.embedding_dim)
        self.transformer = JaggedEncoder(
            embedding_dim=sizes.embedding_dim,
            num_heads=sizes.num_heads,
            num_layers=num_layers,
            dropout=sizes.dropout,
            final_norm=True,
        )
        self.match = Match(sizes.embedding_dim, sizes.dropout)


def perceptron(inputs: int, hidden: int, outputs: int, dropout: float) -> nn.Sequential:
    """Two linear layers with a ReLU between them."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, outputs)
    )


def token_table(num_rows: int, embedding_dim: int) -> nn.Embedding:
    """A table of vectors on the scale of the tokens, which are item rows times sqrt(D)."""
    table = nn.Embedding(num_rows, embedding_dim)
    nn.init.normal_(table.weight, std=0.02 * embedding_dim**0.5)
    return table


def offsets_with_start(batch: Batch) -> Tensor:
    """`[B + 1]` of histories that begin with one more token."""
    return complete_cumsum(batch.history_offsets.diff() + 1)
