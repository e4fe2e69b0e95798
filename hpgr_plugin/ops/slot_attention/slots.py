"""What each candidate reads of a history, and the settings of its attention."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

NewRows = tuple[Tensor, Tensor, Tensor]  # queries, keys and values `[c, H * d]` of candidates
KeptRows = tuple[Tensor, Tensor]  # keys and values `[H, N, d]` of a history


@dataclass(frozen=True)
class Settings:
    """Of an attention.

    Attributes:
        alpha: factor of the scores.
        norm_length: n, by which the attention is divided.
        mask_position: where the weights of the slots enter, "post" or "pre".
    """

    alpha: float
    norm_length: float
    mask_position: Literal["post", "pre"] = "post"


@dataclass(frozen=True, eq=False)
class SlotBias:
    """The relative bias of one layer, by places in a table.

    Attributes:
        table: `[B]`.
        own: place of a candidate's distance to itself.
        near: int64 `[c or 1, W]`, places of the rows that all read.
        slots: int64 `[c, S]`, places of the slots.
    """

    table: Tensor
    own: int
    near: Tensor
    slots: Tensor


@dataclass(frozen=True, eq=False)
class Slots:
    """What each of c candidates reads of N rows.

    Attributes:
        near: int64 `[W]`, rows that every candidate reads with weight 1.
        index: int64 `[c, S]`, rows of its own; 0 in empty slots.
        weights: `[c, S]`; 0 in empty slots. A row has no index twice but for empty slots.
        num_rows: N.
        num_heads: of the attention, H.
    """

    near: Tensor
    index: Tensor
    weights: Tensor
    num_rows: int
    num_heads: int

    def take(self, rows: slice) -> Slots:
        """Those of some candidates."""
        index, weights = self.index[rows], self.weights[rows]
        return Slots(self.near, index, weights, self.num_rows, self.num_heads)

    def dense(self) -> Tensor:
        """The weights of all rows, `[c, N]`."""
        weights = self.weights.new_zeros(len(self.index), self.num_rows)
        return weights.scatter_add_(1, self.index, self.weights).index_fill_(1, self.near, 1.0)

    @cached_property
    def index_of_heads(self) -> Tensor:
        """The slots' rows among those of all heads, one head behind the other, `[H * c, S]`."""
        first = torch.arange(self.num_heads, device=self.index.device) * self.num_rows
        return (first.view(-1, 1, 1) + self.index).flatten(0, 1)

    @cached_property
    def pattern(self) -> Tensor:
        """A CSR matrix `[H * c, H * N]` with an entry for every slot; its values are written to."""
        rows, slots = self.index_of_heads.shape
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
            return torch.sparse_csr_tensor(
                torch.arange(0, rows * slots + 1, max(1, slots)),
                self.index_of_heads.flatten(),
                self.weights.new_zeros(rows * slots),
                (rows, self.num_heads * self.num_rows),
            )
