"""The padded view of a :class:`TokenSequence` that the encoders' layers work on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hpgr_plugin.hosts.embedded.model.attention import visibility
from hpgr_plugin.hosts.embedded.model.bias import RelativeBias
from hpgr_plugin.hosts.embedded.model.tokens import NEVER_SEEN, Domain, TokenSequence
from hpgr_plugin.ops.jagged import jagged_to_padded_dense, ranges, segment_ids
from hpgr_plugin.ops.preference_plan.plan import PreferencePlan


@dataclass
class AttentionInputs:
    """What every layer's attention reads beside q, k and v.

    Attributes:
        visible: ``[S, Q, K]`` bool.
        weights: ``[S, Q | 1, K]`` PGSA's M, or None.
        buckets: ``[S, Q, K]`` relative-bias buckets, or None.
        norm_length: the ``n`` of the attention's ``1 / n``.
        mask_position: where the weights go, ``"post"`` or ``"pre"`` the activation.
    """

    visible: Tensor
    weights: Tensor | None
    buckets: Tensor | None
    norm_length: float
    mask_position: str

    def take_rows(self, rows: Tensor) -> AttentionInputs:
        """The same for the query rows ``rows [S, R]`` alone."""
        weights = self.weights
        if weights is not None and weights.shape[1] > 1:
            weights = take_rows(weights, rows)
        return replace(
            self,
            visible=take_rows(self.visible, rows),
            weights=weights,
            buckets=None if self.buckets is None else take_rows(self.buckets, rows),
        )


def take_rows(dense: Tensor, rows: Tensor) -> Tensor:
    """``dense [S, N, X]`` at ``rows [S, R]`` -> ``[S, R, X]``."""
    return dense.gather(1, rows.unsqueeze(2).expand(-1, -1, dense.shape[2]))


@dataclass
class PaddedTokens:
    """Sequences padded to one length.

    Attributes:
        values: ``[S, N, D]``.
        domains: ``[S, N]`` int64.
        attention: the attention's other inputs, for all rows.
        candidate_rows: ``[S, R]`` rows of the candidates, padded by repeating the last row.
        candidate_index: ``[C]`` where each candidate lies in ``[S * R]``.
    """

    values: Tensor
    domains: Tensor
    attention: AttentionInputs
    candidate_rows: Tensor
    candidate_index: Tensor


def pad(
    sequence: TokenSequence,
    *,
    bias: RelativeBias | None,
    norm_length: float,
    mask_position: str,
    use_column_weights: bool,
    row_plan: PreferencePlan | None,
) -> PaddedTokens:
    """Pad ``sequence`` and work out who sees whom, with what weight.

    Args:
        sequence: the tokens.
        bias: the encoder's bias module, for the buckets; None for no bias.
        norm_length: see :class:`AttentionInputs`.
        mask_position: see :class:`AttentionInputs`.
        use_column_weights: whether the tokens' own weights are anything but ones.
        row_plan: candidate-layout weights; its rows are the candidates and its indices are token
            rows of ``sequence``.
    """
    tokens, offsets = sequence.tokens, sequence.offsets
    lengths = offsets.diff()
    length = int(lengths.max())
    positions, times, key, query, domains = (
        _pad_integers(column, offsets, length, fill)
        for column, fill in (
            (tokens.positions, 0),
            (tokens.timestamps, 0),
            (tokens.key_order, NEVER_SEEN),
            (tokens.query_order, -1),
            (tokens.domains, int(Domain.CONTEXT)),
        )
    )
    same = torch.eye(length, dtype=torch.bool, device=key.device)
    weights = None
    if row_plan is not None:
        weights = _row_weights(sequence, row_plan, domains)
    elif use_column_weights:
        weights = jagged_to_padded_dense(tokens.weights.unsqueeze(1), offsets, length).mT
    attention = AttentionInputs(
        visible=visibility(query, key, same),
        weights=weights,
        buckets=None if bias is None else bias.buckets(positions, times, positions, times),
        norm_length=norm_length,
        mask_position=mask_position,
    )
    counts = sequence.candidates_per_sequence
    most = int(counts.max()) if counts.numel() else 0
    place = torch.arange(most, device=counts.device)
    first = lengths - counts
    rows = torch.minimum(first.unsqueeze(1) + place, (lengths - 1).clamp(min=0).unsqueeze(1))
    return PaddedTokens(
        values=jagged_to_padded_dense(tokens.values, offsets, length),
        domains=domains,
        attention=attention,
        candidate_rows=rows,
        candidate_index=ranges(torch.arange(len(counts), device=counts.device) * most, counts),
    )


def _pad_integers(column: Tensor, offsets: Tensor, length: int, fill: int) -> Tensor:
    """Integers ``[L]`` -> ``[S, length]``; exact for any int64, unlike a float round trip."""
    lengths = offsets.diff()
    padded = column.new_full((lengths.shape[0], length), fill)
    valid = torch.arange(length, device=column.device) < lengths.unsqueeze(1)
    padded[valid] = column
    return padded


def _row_weights(sequence: TokenSequence, plan: PreferencePlan, domains: Tensor) -> Tensor:
    """``[S, N, N]``: ones, but in a candidate's row the history columns carry its plan."""
    counts = sequence.candidates_per_sequence
    lengths = sequence.offsets.diff()
    owner = segment_ids(
        torch.cat([counts.new_zeros(1), counts.cumsum(0)]), plan.offsets.numel() - 1
    )
    row = ranges(lengths - counts, counts)
    is_history = (domains == Domain.HISTORY) | (domains == Domain.REALTIME)
    candidate_rows = (~is_history).to(plan.weights.dtype)[owner]
    planned = segment_ids(plan.offsets, plan.index.numel())
    column = plan.index - sequence.offsets[owner[planned]]
    candidate_rows[planned, column] = plan.weights
    size = domains.shape[1]
    weights = plan.weights.new_ones(domains.shape[0], size, size)
    weights[owner, row] = candidate_rows
    return weights
