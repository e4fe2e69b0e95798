"""One jagged sequence of tokens a user (or a user-candidate pair), and who may see whom.

Visibility needs two integers a token, the same for every encoder: token i sees token j when
``key_order[j] < query_order[i]``, and always itself. Orders are counted in the *full* history,
so they stay right when a plan drops tokens.

==================  =====================  ==========================================
token               key_order              query_order
==================  =====================  ==========================================
context             -1                     0 (sees the context)
history, rank r     r (causal)             r (sees the ranks below it)
history, shared     -1 (seen by all)       0 (sees everything that is shared)
candidate           NEVER_SEEN             visible history items of this candidate
==================  =====================  ==========================================
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from hpgr_plugin.ops.jagged import complete_cumsum, ranges

NEVER_SEEN = 2**30


class Domain(IntEnum):
    """Token domains, normalised apart by MTGR's group layer norm."""

    CONTEXT = 0
    HISTORY = 1
    REALTIME = 2
    CANDIDATE = 3


@dataclass
class Tokens:
    """Token rows of one kind: embeddings and the integers that travel with them.

    Attributes:
        values: ``[L, D]`` embeddings.
        positions: ``[L]`` int64, place in the full sequence (0 for context).
        timestamps: ``[L]`` int64 seconds.
        key_order: ``[L]`` int64, see the module's table.
        query_order: ``[L]`` int64, see the module's table.
        domains: ``[L]`` int64, a :class:`Domain`.
        weights: ``[L]`` column weights of the attention (1 = leave as it is).
    """

    values: Tensor
    positions: Tensor
    timestamps: Tensor
    key_order: Tensor
    query_order: Tensor
    domains: Tensor
    weights: Tensor

    def select(self, index: Tensor) -> Tokens:
        """The rows ``index [P]``, in that order."""
        return Tokens(*(column.index_select(0, index) for column in self.columns()))

    def columns(self) -> tuple[Tensor, ...]:
        return (
            self.values,
            self.positions,
            self.timestamps,
            self.key_order,
            self.query_order,
            self.domains,
            self.weights,
        )


@dataclass
class TokenSequence:
    """Sequences ``[context | history | candidates]``, jagged.

    Attributes:
        tokens: the ``L`` token rows.
        offsets: ``[S + 1]`` sequence boundaries.
        candidates_per_sequence: ``[S]`` candidates at the end of each sequence.
    """

    tokens: Tokens
    offsets: Tensor
    candidates_per_sequence: Tensor

    def select(self, chosen: Tensor) -> TokenSequence:
        """The sequences ``chosen [R]``, in that order."""
        lengths = self.offsets.diff()[chosen]
        rows = ranges(self.offsets[:-1][chosen], lengths)
        return TokenSequence(
            self.tokens.select(rows), complete_cumsum(lengths), self.candidates_per_sequence[chosen]
        )


def concatenate(parts: list[tuple[Tokens, Tensor]]) -> TokenSequence:
    """Interleave parts ``(tokens, lengths [S])`` sequence by sequence; the last are candidates."""
    lengths = torch.stack([length for _, length in parts], dim=1)
    part_starts = torch.zeros_like(lengths)
    part_starts[1:] = lengths.cumsum(0)[:-1]
    sizes = torch.tensor([tokens.values.shape[0] for tokens, _ in parts])
    part_starts += (sizes.cumsum(0) - sizes).to(lengths.device)
    source = ranges(part_starts.flatten(), lengths.flatten())
    columns = zip(*(tokens.columns() for tokens, _ in parts), strict=True)
    merged = Tokens(*map(torch.cat, columns))
    return TokenSequence(merged.select(source), complete_cumsum(lengths.sum(1)), parts[-1][1])
