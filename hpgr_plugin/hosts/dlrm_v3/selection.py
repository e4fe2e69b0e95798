"""Select first: the histories of a batch, shortened to what its plan keeps.

Everything of the host then reads the kept rows only. What must stay that of the full sequences
(positions, the lengths that contextual features depend on, the n of 1/n) is handed on beside them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpgr_plugin.hosts.dlrm_v3.kept_lookup import select_kept
from hpgr_plugin.ops.compact.parts import SequenceParts
from hpgr_plugin.ops.jagged import segment_ids
from hpgr_plugin.ops.preference_plan import PreferencePlan

_HISTORY_OFFSETS = "uih_offsets"  # a payload of the host


class RankingBatch(NamedTuple):
    """The arguments of the host's `main_forward`: histories and candidates, looked up."""

    seq_embeddings: dict[str, Any]
    payload_features: dict[str, Tensor]
    max_uih_len: int
    uih_seq_lengths: Tensor
    max_num_candidates: int
    num_candidates: Tensor

    @property
    def history_offsets(self) -> Tensor:
        """`[B + 1]`."""
        return self.payload_features[_HISTORY_OFFSETS]

    @property
    def candidate_offsets(self) -> Tensor:
        """`[B + 1]`."""
        return self.payload_features["candidate_offsets"]


class KeptHistory(NamedTuple):
    """The kept rows of B histories, each once and in their order.

    Attributes:
        rows: int64 `[P]`, rows of the flat histories.
        offsets: int64 `[B + 1]`.
        max_length: an upper bound of the kept rows of a user.
        plan: the plan, by these rows.
        by_user: whether row b of the plan is user b, and keeps all of the user's rows.
    """

    rows: Tensor
    offsets: Tensor
    max_length: int
    plan: PreferencePlan
    by_user: bool


def keep(
    plan: PreferencePlan,
    history_offsets: Tensor,
    *,
    num_history: int,
    max_history: int,
    longest_row: int,
    by_user: bool,
) -> KeptHistory:
    """What is left of the histories.

    Args:
        plan: by rows of the flat histories.
        history_offsets: `[B + 1]`.
        num_history: T.
        max_history: the longest history.
        longest_row: an upper bound of the items in a row of the plan.
        by_user: whether row b of the plan is user b. Otherwise rows of several candidates may name
            the same items, and the device is asked how many there are.
    """
    if by_user:
        rows = torch.arange(plan.index.numel(), device=plan.index.device)
        return KeptHistory(plan.index, plan.offsets, longest_row, plan._replace(index=rows), True)
    marked = torch.zeros(num_history, dtype=torch.int64, device=plan.index.device)
    marked.index_fill_(0, plan.index, 1)
    before = torch.nn.functional.pad(marked.cumsum(0), (1, 0))
    total = int(before[-1])
    # Dropped items all go to one slot past the end: no shape that the device has to be asked for.
    place = torch.where(marked > 0, before[:-1], total)
    rows = torch.empty(total + 1, dtype=torch.int64, device=place.device)
    rows.scatter_(0, place, torch.arange(num_history, device=place.device))
    return KeptHistory(
        rows[:total],
        before[history_offsets.long()],
        max_history,
        plan._replace(index=before[plan.index]),
        False,
    )


def shortened(
    batch: RankingBatch,
    kept: KeptHistory,
    *,
    history_features: Iterable[str],
    min_lengths: Mapping[str, int],
    read_whole: bool = False,
) -> RankingBatch:
    """The batch with the kept rows of its histories only.

    Args:
        batch: as looked up.
        kept: of its histories.
        history_features: names of the features that have one row per history item.
        min_lengths: contextual features that count from this length of the full sequence on: their
            rows are zeroed here, because the host would compare with the shortened one.
        read_whole: whether the whole histories get gradients anyway.
    """
    lengths = kept.offsets.diff().to(batch.uih_seq_lengths.dtype)
    embeddings, payloads = dict(batch.seq_embeddings), dict(batch.payload_features)
    looked_up = {name: rows.embedding for name, rows in embeddings.items()}
    histories = [name for name in history_features if name in embeddings]
    if read_whole:
        selected = {name: looked_up[name].index_select(0, kept.rows) for name in histories}
    else:
        selected = select_kept(looked_up, kept.rows, histories)
    for name, rows in selected.items():
        of_rows = lengths if name in histories else embeddings[name].lengths
        embeddings[name] = _like(embeddings[name], of_rows, rows)
    for name in history_features:
        if name in payloads:
            payloads[name] = payloads[name].index_select(0, kept.rows)
    payloads[_HISTORY_OFFSETS] = kept.offsets.to(batch.history_offsets.dtype)
    for name, least in min_lengths.items():
        full = batch.uih_seq_lengths + batch.num_candidates
        rows = embeddings[name].embedding
        counts = (full >= least).repeat_interleave(embeddings[name].lengths, output_size=len(rows))
        embeddings[name] = _like(
            embeddings[name], embeddings[name].lengths, rows * counts.unsqueeze(1)
        )
    return batch._replace(
        seq_embeddings=embeddings,
        payload_features=payloads,
        max_uih_len=kept.max_length,
        uih_seq_lengths=lengths,
    )


def _like(rows: Any, lengths: Tensor, embedding: Tensor) -> Any:
    """Looked-up rows in the host's type for them, a dataclass or a named tuple by its version."""
    return type(rows)(lengths=lengths, embedding=embedding)


@dataclass(frozen=True)
class FullPlaces:
    """Where the history rows and candidates of sequences are in the full sequences.

    Attributes:
        parts: of the sequences, shortened or not.
        rows: int64 `[P]`, the row of each history token in the flat full histories.
        full_offsets: int64 `[B + 1]` of the full histories.
        earlier: int64 `[C]`, how many items of the full history lie before each candidate.
    """

    parts: SequenceParts
    rows: Tensor
    full_offsets: Tensor
    earlier: Tensor | None = None

    @cached_property
    def users(self) -> Tensor:
        """The user of each history token, int64 `[P]`."""
        return segment_ids(self.parts.history_offsets, self.parts.num_history)

    @property
    def from_start(self) -> Tensor:
        """The place of each history token in its full history, int64 `[P]`, from 0."""
        return self.rows - self.full_offsets[self.users]

    @property
    def from_end(self) -> Tensor:
        """The same counted from the end, where the last item is 1."""
        return self.full_offsets[1:][self.users] - self.rows

    def of_every_row(self, contextual: Tensor, history: Tensor, candidates: Tensor) -> Tensor:
        """Integers of the three kinds of rows in the order of the sequences, `[L]`.

        Args:
            contextual: `[contextual_len]`, the same for every sequence.
            history: `[P]`.
            candidates: `[C]`, or one for all.
        """
        parts = self.parts
        values = history.new_empty(parts.total_rows)
        values[parts.history_rows()] = history
        values[parts.candidate_rows()] = candidates
        if parts.contextual_len:
            values[parts.contextual_rows()] = contextual.repeat(parts.seq_offsets.numel() - 1)
        return values
