"""Index arithmetic between sequences `[contextual | history | candidates]` and a plan.

There is one sequence per user, and the contextual prefix is equally long in all of them. All
functions speak in rows of the flat tensor that holds these sequences one after the other.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from hpgr_plugin.ops.jagged import complete_cumsum, ranges, segment_ids
from hpgr_plugin.ops.preference_plan import PreferencePlan


@dataclass(frozen=True)
class SequenceParts:
    """Where the parts of B sequences `[contextual | history | candidates]` lie.

    Attributes:
        seq_offsets: `[B + 1]` of the sequences.
        history_offsets: `[B + 1]` of the histories only.
        candidate_offsets: `[B + 1]` of the candidates only.
        contextual_len: tokens in front of every history.
        num_history, num_candidates: totals T and C.
        one_candidate_each: every sequence is known to end in exactly one candidate.
    """

    seq_offsets: Tensor
    history_offsets: Tensor
    candidate_offsets: Tensor
    contextual_len: int
    num_history: int
    num_candidates: int
    one_candidate_each: bool = False

    def history_rows(self) -> Tensor:
        """Sequence row of every history token, `[T]` int64."""
        return self._history_rows

    def candidate_rows(self) -> Tensor:
        """Sequence row of every candidate, `[C]` int64."""
        return self._candidate_rows

    @cached_property
    def _history_rows(self) -> Tensor:
        return _shifted(
            self.seq_offsets[:-1] + self.contextual_len, self.history_offsets, self.num_history
        )

    @cached_property
    def _candidate_rows(self) -> Tensor:
        if self.one_candidate_each:
            return self.seq_offsets[1:].long() - 1
        return _shifted(self._candidate_starts(), self.candidate_offsets, self.num_candidates)

    def contextual_rows(self) -> Tensor:
        """Sequence row of every contextual token, `[B * contextual_len]` int64."""
        places = torch.arange(self.contextual_len, device=self.seq_offsets.device)
        return (self.seq_offsets[:-1].unsqueeze(1) + places).flatten()

    @property
    def total_rows(self) -> int:
        """Rows of all sequences."""
        contextual = self.contextual_len * (self.seq_offsets.numel() - 1)
        return contextual + self.num_history + self.num_candidates

    def candidate_users(self) -> Tensor:
        """The user of every candidate, `[C]` int64."""
        return segment_ids(self.candidate_offsets, self.num_candidates)

    def candidate_columns(self) -> Tensor:
        """The place of every candidate inside its own sequence, `[C]` int64."""
        users = self.candidate_users()
        return self.candidate_rows() - self.seq_offsets.long()[users]

    def _candidate_starts(self) -> Tensor:
        return self.seq_offsets[1:] - self.candidate_offsets.diff()


def _shifted(starts: Tensor, offsets: Tensor, total: int) -> Tensor:
    """Where the rows of segments go that are moved to new starts, `[total]` int64."""
    shift = (starts - offsets[:-1]).long()
    shift = shift.repeat_interleave(offsets.diff(), output_size=total)
    return torch.arange(total, device=offsets.device) + shift


def joined_parts(
    history_offsets: Tensor,
    candidate_offsets: Tensor,
    *,
    contextual_len: int,
    num_history: int,
    num_candidates: int,
    one_candidate_each: bool = False,
) -> SequenceParts:
    """The parts of sequences that hold these histories `[B + 1]` and candidates `[B + 1]`."""
    history_offsets, candidate_offsets = history_offsets.long(), candidate_offsets.long()
    seq_offsets = history_offsets + candidate_offsets
    if contextual_len:
        users = torch.arange(seq_offsets.numel(), device=seq_offsets.device)
        seq_offsets = seq_offsets + contextual_len * users
    return SequenceParts(
        seq_offsets,
        history_offsets,
        candidate_offsets,
        contextual_len,
        num_history,
        num_candidates,
        one_candidate_each,
    )


def sequence_parts(
    seq_offsets: Tensor,
    num_targets: Tensor,
    *,
    contextual_len: int,
    total_rows: int,
    num_candidates: int | None = None,
) -> SequenceParts:
    """The parts of host sequences.

    Args:
        seq_offsets: `[B + 1]`.
        num_targets: `[B]` candidates at the end of each sequence.
        contextual_len: tokens at the front of each sequence.
        total_rows: rows of the flat tensor.
        num_candidates: C; None: the device is asked for it.
    """
    candidate_offsets = complete_cumsum(num_targets.long())
    if num_candidates is None:
        num_candidates = int(candidate_offsets[-1].item())
    history_lengths = seq_offsets.diff() - num_targets - contextual_len
    num_users = num_targets.numel()
    return SequenceParts(
        seq_offsets=seq_offsets.long(),
        history_offsets=complete_cumsum(history_lengths.long()),
        candidate_offsets=candidate_offsets,
        contextual_len=contextual_len,
        num_history=total_rows - num_candidates - contextual_len * num_users,
        num_candidates=num_candidates,
    )


class KeptRows(NamedTuple):
    """Rows of histories and candidates that become short sequences.

    Attributes:
        index: integer `[R]`, rows of the history; candidate c is T + c. Unspecified from
            `offsets[-1]` on.
        offsets: int64 `[C + 1]`; short sequence c owns `index[offsets[c]:offsets[c + 1]]`.
        num_rows: rows that are copied, at most R; `offsets[-1]` or more.
        disjoint: no history row is named twice, as with one candidate per user: its gradient is
            then stored instead of added up.
    """

    index: Tensor  # type: ignore[assignment]  # a tuple has an index method too
    offsets: Tensor
    num_rows: int
    disjoint: bool = False


class ShortSequences(NamedTuple):
    """Short sequences gathered out of the full ones, one for each row of a plan.

    Attributes:
        index: `[L']` int64, the row of the full sequences that each short row is a copy of.
        weights: `[L']` M_j of each short row; contextual tokens and candidates have 1.
        lengths: `[R]` of the short sequences.
        num_targets: `[R]` candidates at the end of each.
        max_len: the longest of them, or more.
    """

    index: Tensor  # type: ignore[assignment]  # a tuple has an index method too
    weights: Tensor
    lengths: Tensor
    num_targets: Tensor
    max_len: int


def short_sequences(
    parts: SequenceParts, plan: PreferencePlan, *, per_user: bool, max_length: int | None = None
) -> ShortSequences:
    """One sequence `[contextual | planned history | candidates]` for each row of the plan.

    Args:
        parts: of the full sequences.
        plan: rows are candidates, or users if `per_user`.
        per_user: whether all candidates of a user share one short sequence.
        max_length: upper bound of the short sequences; None: the device is asked for it.
    """
    device = parts.seq_offsets.device
    if per_user:
        users = torch.arange(parts.seq_offsets.numel() - 1, device=device)
        targets = parts.candidate_offsets.diff()
        target_starts = parts.seq_offsets[1:] - targets
    else:
        users = parts.candidate_users()
        targets = torch.ones_like(users)
        target_starts = parts.candidate_rows()
    kept = plan.offsets.diff()
    lengths = kept + parts.contextual_len + targets
    offsets = complete_cumsum(lengths)

    if max_length is None:
        max_length = int(lengths.max()) if lengths.numel() else 1
    contextual = torch.full_like(lengths, parts.contextual_len)
    totals = parts.contextual_len * users.numel(), plan.index.numel(), parts.num_candidates
    sources = torch.cat(
        [
            ranges(parts.seq_offsets[users], contextual, totals[0]),
            parts.history_rows()[plan.index],
            ranges(target_starts, targets, totals[2]),
        ]
    )
    places = torch.cat(
        [
            ranges(offsets[:-1], contextual, totals[0]),
            ranges(offsets[:-1] + parts.contextual_len, kept, totals[1]),
            ranges(offsets[1:] - targets, targets, totals[2]),
        ]
    )
    num_contextual = parts.contextual_len * users.numel()
    weights = plan.weights.new_ones(sources.numel())
    weights[num_contextual : num_contextual + plan.weights.numel()] = plan.weights
    return ShortSequences(
        index=torch.empty_like(sources).index_copy_(0, places, sources),
        weights=torch.empty_like(weights).index_copy_(0, places, weights),
        lengths=lengths,
        num_targets=targets,
        max_len=max_length,
    )


def visible_plan(
    history_timestamps: Tensor, candidate_timestamps: Tensor, parts: SequenceParts
) -> PreferencePlan | None:
    """Every history token before each candidate, with weight 1.

    Args:
        history_timestamps: `[T]`.
        candidate_timestamps: `[C]`.
        parts: of the sequences they come from.

    Returns:
        One row per candidate, or None if no candidate has a token at or after its own time.
    """
    users = parts.candidate_users()
    lengths = parts.history_offsets.diff()[users]
    index = ranges(parts.history_offsets[:-1][users], lengths)
    rows = segment_ids(complete_cumsum(lengths), index.numel())
    visible = history_timestamps[index] < candidate_timestamps[rows]
    if bool(visible.all()):
        return None
    index, rows = index[visible], rows[visible]
    counts = torch.bincount(rows, minlength=parts.num_candidates)
    weights = torch.ones(index.numel(), device=index.device)
    return PreferencePlan(index, weights, complete_cumsum(counts))


def row_weights(parts: SequenceParts, plan: PreferencePlan, max_len: int) -> Tensor:
    """M of every candidate over the columns of its own sequence, `[C, max_len]`.

    The contextual prefix and the candidate's own column weigh 1, planned history tokens M_j, all
    other columns (dropped history, other candidates) 0.

    Args:
        parts: of the sequences.
        plan: one row per candidate.
        max_len: columns, the longest sequence.
    """
    weights = plan.weights.new_zeros(parts.num_candidates, max_len)
    weights[:, : parts.contextual_len] = 1.0
    candidate = segment_ids(plan.offsets, plan.index.numel())
    starts = parts.history_offsets[:-1][parts.candidate_users()]
    weights[candidate, plan.index - starts[candidate] + parts.contextual_len] = plan.weights
    own = parts.candidate_columns().unsqueeze(1)
    return weights.scatter_(1, own, 1.0)
