"""One jagged sequence of tokens per user (or per user and candidate), and who sees whom.

Visibility needs two integers per token, the same for every encoder: token i sees token j when
`key_order[j] < query_order[i]`, and always itself. Orders are counted in the full history, so they
stay right when a plan drops tokens.

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
from typing import NamedTuple

import torch
from torch import Tensor

from hpgr_plugin.components.positions import count_earlier, moved_up
from hpgr_plugin.components.sem import SessionTokens
from hpgr_plugin.data.batch import Batch
from hpgr_plugin.hosts.embedded.model.session_tokens import MixedHistory
from hpgr_plugin.ops.compact.parts import SequenceParts, short_sequences
from hpgr_plugin.ops.jagged import complete_cumsum, ranges, segment_ids, segment_positions
from hpgr_plugin.ops.preference_plan import PreferencePlan

NEVER_SEEN = 2**30


class Domain(IntEnum):
    """Token domains, normalised apart by MTGR's group layer norm."""

    CONTEXT = 0
    HISTORY = 1
    REALTIME = 2
    CANDIDATE = 3


class Marks(NamedTuple):
    """The integers that travel with every token, int64 `[L]` each.

    Attributes:
        positions: place in the full sequence, 0 for context.
        timestamps: seconds.
        key_order, query_order: see the module's table.
        domains: a `Domain`.
    """

    positions: Tensor
    timestamps: Tensor
    key_order: Tensor
    query_order: Tensor
    domains: Tensor


PADDING_MARKS = (0, 0, NEVER_SEEN, -1, int(Domain.CONTEXT))


class RequestIndex(NamedTuple):
    """Index arithmetic of a batch, done once per step.

    Attributes:
        history_users: `[T]` the request of every history item.
        history_ranks: `[T]` its place in the history, from 0.
        history_positions: `[T]` its index by Eq. 4, from 1.
        candidate_users: `[C]` the request of every candidate.
        earlier: `[C]` history items strictly before the candidate: Eq. 4's index less one.
        visible: `[C]` history items that the candidate may see; they are the first ones.
    """

    history_users: Tensor
    history_ranks: Tensor
    history_positions: Tensor
    candidate_users: Tensor
    earlier: Tensor
    visible: Tensor

    @classmethod
    def of(cls, batch: Batch, *, hide_future: bool) -> RequestIndex:
        """The index of a batch; without `hide_future` a candidate sees the whole history."""
        owner = segment_ids(batch.candidate_offsets, batch.num_candidates)
        earlier = count_earlier(
            batch.history_timestamps,
            batch.history_offsets,
            batch.candidate_timestamps,
            batch.candidate_offsets,
        )
        ranks = segment_positions(batch.history_offsets, batch.history_items.numel())
        users = segment_ids(batch.history_offsets, batch.history_items.numel())
        positions = ranks + 1
        if not hide_future:
            positions += moved_up(ranks, users, earlier, batch.candidate_offsets)
        return cls(
            history_users=users,
            history_ranks=ranks,
            history_positions=positions,
            candidate_users=owner,
            earlier=earlier,
            visible=earlier if hide_future else batch.history_offsets.diff()[owner],
        )


@dataclass
class TokenSequence:
    """Sequences `[context | history | candidates]`, jagged.

    Attributes:
        values: `[V, D]` embeddings of distinct tokens.
        marks: int64 `[V, 5]`, the columns of `Marks`.
        offsets: `[S + 1]` sequence boundaries.
        candidates_per_sequence: `[S]` candidates at the end of each sequence.
        column_weights: M `[L]` of shortened sequences, or None.
        row_plan: weights of the candidates' rows over a shared history, or None.
        parts: of the full sequences, which `row_plan` speaks of.
        source: int64 `[L]`, the row of `values` that each token is; None: one each, in order.
    """

    values: Tensor
    marks: Tensor
    offsets: Tensor
    candidates_per_sequence: Tensor
    column_weights: Tensor | None = None
    row_plan: PreferencePlan | None = None
    parts: SequenceParts | None = None
    source: Tensor | None = None

    def select(self, chosen: Tensor) -> TokenSequence:
        """The sequences `chosen` `[R]`, in that order."""
        lengths = self.offsets.diff()[chosen]
        rows = ranges(self.offsets[:-1][chosen], lengths)
        weights, source, values, marks = self.column_weights, self.source, self.values, self.marks
        if source is None:
            values, marks = values.index_select(0, rows), marks.index_select(0, rows)
        return TokenSequence(
            values=values,
            marks=marks,
            source=None if source is None else source[rows],
            offsets=complete_cumsum(lengths),
            candidates_per_sequence=self.candidates_per_sequence[chosen],
            column_weights=None if weights is None else weights.index_select(0, rows),
        )

    def marks_of_tokens(self) -> Tensor:
        """int64 `[L, 5]`."""
        return self.marks if self.source is None else self.marks.index_select(0, self.source)


def build_sequence(
    batch: Batch,
    index: RequestIndex,
    *,
    history: Tensor,
    candidates: Tensor,
    context: Tensor | None,
    dynamic_mask: bool,
    plan: PreferencePlan | None = None,
    layout: str = "shared_history",
    session_tokens: SessionTokens | None = None,
) -> TokenSequence:
    """The encoder's tokens, shortened where the plan's layout says so.

    Args:
        batch: the requests.
        index: of the same requests.
        history: `[T, D]` tokens.
        candidates: `[C, D]` tokens.
        context: `[B * context tokens per user, D]` tokens, or None.
        dynamic_mask: MTGR's mask: what every candidate may see is fully connected.
        plan: of the attention hook; None keeps every history whole.
        layout: of the plan, see `AttentionHook.layout`.
        session_tokens: go into the histories, with the marks of the items they go before.
    """
    history_marks = _history_marks(batch, index, dynamic_mask)
    history_offsets = batch.history_offsets
    if session_tokens is not None:
        mixed = MixedHistory.of(session_tokens, history_offsets, len(history))
        if plan is not None:
            plan = mixed.mix_plan(plan, *_rows_of_plan(batch, index, layout))
        history = mixed.mix(history, session_tokens.values)
        history_marks = mixed.mix(history_marks, history_marks[session_tokens.before])
        history_offsets = mixed.offsets
    users = batch.num_requests
    context_len = 0 if context is None else len(context) // max(1, users)
    lengths = history_offsets.diff() + batch.candidate_offsets.diff() + context_len
    parts = SequenceParts(
        seq_offsets=complete_cumsum(lengths),
        history_offsets=history_offsets,
        candidate_offsets=batch.candidate_offsets,
        contextual_len=context_len,
        num_history=len(history),
        num_candidates=len(candidates),
    )
    tokens = [history, candidates] if context is None else [context, history, candidates]
    marks = [history_marks, _candidate_marks(batch, index)]
    rows = [parts.history_rows(), parts.candidate_rows()]
    if context is not None:
        marks.insert(0, _context_marks(len(context), history.device))
        rows.insert(0, ranges(parts.seq_offsets[:-1], torch.full_like(lengths, context_len)))
    place = torch.cat(rows)
    sequence = TokenSequence(
        values=history.new_empty(len(place), history.shape[1]).index_copy(
            0, place, torch.cat(tokens)
        ),
        marks=torch.empty_like(torch.cat(marks)).index_copy_(0, place, torch.cat(marks)),
        offsets=parts.seq_offsets,
        candidates_per_sequence=batch.candidate_offsets.diff(),
    )
    if plan is None:
        return sequence
    if layout == "shared_history":
        sequence.row_plan, sequence.parts = plan, parts
        return sequence
    short = short_sequences(parts, plan, per_user=layout == "per_user")
    return TokenSequence(
        values=sequence.values,
        marks=sequence.marks,
        source=short.index,
        offsets=complete_cumsum(short.lengths),
        candidates_per_sequence=short.num_targets,
        column_weights=short.weights,
    )


def _rows_of_plan(batch: Batch, index: RequestIndex, layout: str) -> tuple[Tensor, Tensor | None]:
    """Whose each row of a plan is, and the first item that it must not see."""
    if layout == "per_user":
        return torch.arange(batch.num_requests, device=batch.users.device), None
    users = index.candidate_users
    return users, batch.history_offsets[:-1][users] + index.visible


def _history_marks(batch: Batch, index: RequestIndex, dynamic_mask: bool) -> Tensor:
    rank = index.history_ranks
    key, query = rank, rank
    domains = torch.full_like(rank, int(Domain.HISTORY))
    if dynamic_mask:
        # What every candidate may see is static: fully connected. Later items are real-time.
        fewest = batch.history_offsets.diff().scatter_reduce(
            0, index.candidate_users, index.visible, reduce="amin", include_self=True
        )
        static = rank < fewest[index.history_users]
        key = torch.where(static, -1, rank)
        query = torch.where(static, 0, rank)
        domains = torch.where(static, int(Domain.HISTORY), int(Domain.REALTIME))
    positions = index.history_positions
    return torch.stack(Marks(positions, batch.history_timestamps, key, query, domains), 1)


def _candidate_marks(batch: Batch, index: RequestIndex) -> Tensor:
    visible = index.visible
    return torch.stack(
        Marks(
            positions=index.earlier + 1,
            timestamps=batch.candidate_timestamps,
            key_order=torch.full_like(visible, NEVER_SEEN),
            query_order=visible,
            domains=torch.full_like(visible, int(Domain.CANDIDATE)),
        ),
        1,
    )


def _context_marks(count: int, device: torch.device) -> Tensor:
    """Context has no time of its own: one far bucket of the bias for all."""
    row = torch.tensor([0, 0, -1, 0, int(Domain.CONTEXT)], device=device)
    return row.expand(count, -1)
