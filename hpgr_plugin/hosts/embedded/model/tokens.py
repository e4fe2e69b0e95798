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

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from hpgr_plugin.components.positions import count_earlier, moved_up
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
        num_visible: their sum.
        longest_history: items of the longest history.
        most_candidates: the most candidates of a request.
    """

    history_users: Tensor
    history_ranks: Tensor
    history_positions: Tensor
    candidate_users: Tensor
    earlier: Tensor
    visible: Tensor
    num_visible: int
    longest_history: int
    most_candidates: int

    @classmethod
    def of(cls, batch: Batch, *, hide_future: bool) -> RequestIndex:
        """The index of a batch; without `hide_future` a candidate sees the whole history.

        Of a batch on a CUDA device, it waits once for the three numbers.
        """
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
        lengths = batch.history_offsets.diff()
        visible = earlier if hide_future else lengths[owner]
        sizes = [visible.sum()]
        if batch.num_requests:
            sizes += [lengths.max(), batch.candidate_offsets.diff().max()]
        num_visible, longest, most, *_ = *torch.stack(sizes).tolist(), 0, 0
        return cls(
            history_users=users,
            history_ranks=ranks,
            history_positions=positions,
            candidate_users=owner,
            earlier=earlier,
            visible=visible,
            num_visible=num_visible,
            longest_history=longest,
            most_candidates=most,
        )


class SequenceIndex(NamedTuple):
    """Where the tokens of B whole sequences lie, and who sees whom.

    Attributes:
        place: int64 `[L]`, the row of every token: context, then history, then candidates.
        marks: int64 `[5, L]`, the rows of `Marks`, in the order of the sequences.
        offsets: int64 `[B + 1]` sequence boundaries.
        history_offsets: int64 `[B + 1]` of the histories, session tokens included.
        candidate_rows: int64 `[C]`, the row of every candidate.
        context_len: tokens in front of every history.
        longest: tokens of the longest sequence.
        mixed: where session tokens go in the histories, or None.
    """

    place: Tensor
    marks: Tensor
    offsets: Tensor
    history_offsets: Tensor
    candidate_rows: Tensor
    context_len: int
    longest: int
    mixed: MixedHistory | None

    @classmethod
    def of(
        cls,
        batch: Batch,
        index: RequestIndex,
        *,
        context_len: int,
        dynamic_mask: bool,
        layout: str | None = None,
        before: Tensor | None = None,
    ) -> SequenceIndex:
        """The index of a batch, on its device.

        Args:
            batch: the requests.
            index: of the same requests.
            context_len: context tokens per user.
            dynamic_mask: MTGR's mask: what every candidate may see is fully connected.
            layout: of the plans to come, see `AttentionHook.layout`; None: there are none.
            before: int64 `[K]`, the items that session tokens go before, with the marks of those
                items; None: there are no session tokens.
        """
        history_marks = _history_marks(batch, index, dynamic_mask)
        history_offsets, mixed = batch.history_offsets, None
        if before is not None:
            mixed = MixedHistory.of(before, history_offsets, batch.history_items.numel())
            if layout is not None:
                mixed = mixed.for_plans(*_rows_of_plan(batch, index, layout))
            history_marks = mixed.mix(history_marks, history_marks[before])
            history_offsets = mixed.offsets
        lengths = history_offsets.diff() + batch.candidate_offsets.diff() + context_len
        longest = int(lengths.max()) if batch.num_requests else 0
        parts = SequenceParts(
            seq_offsets=complete_cumsum(lengths),
            history_offsets=history_offsets,
            candidate_offsets=batch.candidate_offsets,
            contextual_len=context_len,
            num_history=len(history_marks),
            num_candidates=batch.num_candidates,
        )
        marks = [history_marks, _candidate_marks(batch, index)]
        candidate_rows = parts.candidate_rows()
        rows = [parts.history_rows(), candidate_rows]
        if context_len:
            context_rows = parts.contextual_rows()
            marks.insert(0, _context_marks(len(context_rows), context_rows.device))
            rows.insert(0, context_rows)
        place, in_parts = torch.cat(rows), torch.cat(marks).T
        return cls(
            place=place,
            marks=torch.empty_like(in_parts, memory_format=torch.contiguous_format).index_copy_(
                1, place, in_parts
            ),
            offsets=parts.seq_offsets,
            history_offsets=history_offsets,
            candidate_rows=candidate_rows,
            context_len=context_len,
            longest=longest,
            mixed=mixed,
        )


@dataclass
class TokenSequence:
    """Sequences `[context | history | candidates]`, jagged.

    Attributes:
        values: `[V, D]` embeddings of distinct tokens.
        marks: int64 `[V, 5]`, the columns of `Marks`.
        offsets: `[S + 1]` sequence boundaries.
        candidate_offsets: `[S + 1]`, how many candidates are at the end of each sequence.
        candidate_rows: int64 `[C]`, which tokens they are.
        longest: tokens of the longest sequence, or more; None: the device is asked for it.
        most_candidates: the most candidates of a sequence, or more; None likewise.
        column_weights: M `[L]` of shortened sequences, or None.
        row_plan: weights of the candidates' rows over a shared history, or None.
        parts: of the full sequences, which `row_plan` speaks of.
        source: int64 `[L]`, the row of `values` that each token is; None: one each, in order.
    """

    values: Tensor
    marks: Tensor
    offsets: Tensor
    candidate_offsets: Tensor
    candidate_rows: Tensor
    longest: int | None = None
    most_candidates: int | None = None
    column_weights: Tensor | None = None
    row_plan: PreferencePlan | None = None
    parts: SequenceParts | None = None
    source: Tensor | None = None

    @property
    def candidates_per_sequence(self) -> Tensor:
        """`[S]` candidates at the end of each sequence."""
        return self.candidate_offsets.diff()

    def select(self, chosen: Tensor) -> TokenSequence:
        """The sequences `chosen` `[R]`, in that order."""
        lengths = self.offsets.diff()[chosen]
        rows = ranges(self.offsets[:-1][chosen], lengths)
        weights, source, values, marks = self.column_weights, self.source, self.values, self.marks
        if source is None:
            values, marks = values.index_select(0, rows), marks.index_select(0, rows)
        offsets, counts = complete_cumsum(lengths), self.candidates_per_sequence[chosen]
        return TokenSequence(
            values=values,
            marks=marks,
            source=None if source is None else source[rows],
            offsets=offsets,
            candidate_offsets=complete_cumsum(counts),
            candidate_rows=ranges(offsets[1:] - counts, counts),
            column_weights=None if weights is None else weights.index_select(0, rows),
        )

    def marks_of_tokens(self) -> Tensor:
        """int64 `[L, 5]`."""
        return self.marks if self.source is None else self.marks.index_select(0, self.source)


def build_sequence(
    batch: Batch,
    index: RequestIndex,
    where: SequenceIndex,
    *,
    history: Tensor,
    candidates: Tensor,
    context: Tensor | None,
    session_tokens: Tensor | None = None,
) -> TokenSequence:
    """The encoder's tokens, whole.

    Args:
        batch: the requests.
        index: of the same requests.
        where: of the same requests.
        history: `[T, D]` tokens.
        candidates: `[C, D]` tokens.
        context: `[B * context tokens per user, D]` tokens, or None.
        session_tokens: `[K, D]` tokens that go into the histories, or None.
    """
    if session_tokens is not None and where.mixed is not None:
        history = where.mixed.mix(history, session_tokens)
    tokens = torch.cat([history, candidates] if context is None else [context, history, candidates])
    return TokenSequence(
        values=torch.empty_like(tokens).index_copy(0, where.place, tokens),
        marks=where.marks.T,
        offsets=where.offsets,
        candidate_offsets=batch.candidate_offsets,
        candidate_rows=where.candidate_rows,
        longest=where.longest,
        most_candidates=index.most_candidates,
    )


def with_plan(
    sequence: TokenSequence,
    plan: PreferencePlan,
    where: SequenceIndex,
    *,
    layout: str,
    longest_row: int | None,
) -> TokenSequence:
    """The sequences shortened, or with weights, as the plan of an attention hook says.

    Args:
        sequence: whole, of `build_sequence`.
        plan: of the history items.
        where: of the same requests.
        layout: of the plan, see `AttentionHook.layout`.
        longest_row: upper bound of the items in a row of the plan; None: the device is asked.
    """
    if where.mixed is not None:
        plan, longest_row = where.mixed.mix_plan(plan), None
    users, num_candidates = len(sequence.offsets) - 1, len(sequence.candidate_rows)
    parts = SequenceParts(
        seq_offsets=sequence.offsets,
        history_offsets=where.history_offsets,
        candidate_offsets=sequence.candidate_offsets,
        contextual_len=where.context_len,
        num_history=len(where.place) - num_candidates - where.context_len * users,
        num_candidates=num_candidates,
    )
    if layout == "shared_history":
        return replace(sequence, row_plan=plan, parts=parts)
    per_user = layout == "per_user"
    longest, most = None, sequence.most_candidates if per_user else 1
    if longest_row is not None and most is not None:
        longest = where.context_len + longest_row + most
    short = short_sequences(parts, plan, per_user=per_user, max_length=longest)
    offsets = complete_cumsum(short.lengths)
    return TokenSequence(
        values=sequence.values,
        marks=sequence.marks,
        source=short.index,
        offsets=offsets,
        candidate_offsets=complete_cumsum(short.num_targets),
        candidate_rows=ranges(offsets[1:] - short.num_targets, short.num_targets, num_candidates),
        longest=short.max_len,
        most_candidates=most,
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
