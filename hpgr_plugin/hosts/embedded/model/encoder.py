"""A stack of HSTU or MTGR layers over jagged token sequences, read at the candidates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hpgr_plugin.components.checks import check_at_least
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.embedded.model.bias import RelativeBias
from hpgr_plugin.hosts.embedded.model.hstu import SequenceLayer, initialise_linear, take_rows
from hpgr_plugin.hosts.embedded.model.tokens import PADDING_MARKS, Marks, TokenSequence
from hpgr_plugin.ops.compact.parts import row_weights
from hpgr_plugin.ops.dispatch import product_dtype
from hpgr_plugin.ops.hstu_attention import (
    AttentionSpec,
    MaskPosition,
    Places,
    Visibility,
    attention_backend,
)
from hpgr_plugin.ops.jagged import jagged_to_padded_dense, ranges
from hpgr_plugin.ops.segments import plan_buckets


class TokenGroup(NamedTuple):
    """S sequences as the layers take them, T tokens in all.

    On Triton's kernels they are jagged; elsewhere padded to N tokens each, T = S * N, and padding
    is part of the flat tensors.

    Attributes:
        values: `[V, D]`, the distinct tokens.
        domains: int64 `[V]`.
        source: int64 `[T]`, the row of `values` that each token is; None: one each.
        spec: of all tokens.
        last: of the candidates only, for the last layer.
        candidate_index: `[C]` where each candidate is among the queries of `last`; None: in order.
    """

    values: Tensor
    domains: Tensor
    source: Tensor | None
    spec: AttentionSpec
    last: AttentionSpec
    candidate_index: Tensor | None

    def expanded(self) -> TokenGroup:
        """The same with a row of values for every token."""
        if self.source is None:
            return self
        values, domains = take_rows(self.values, self.source), self.domains[self.source]
        return self._replace(values=values, domains=domains, source=None)


class SequenceEncoder(nn.Module):
    """`num_layers` layers of one kind; the last computes only the candidates' rows.

    Args:
        layer: `HSTULayer`, `MTGRLayer` or another `SequenceLayer`.
        num_layers: depth.
        embedding_dim: D.
        num_heads: attention heads.
        dropout: inside the layers.
        norm_length: the n of the attention's `1 / n`, that of a full sequence.
        relative_bias: add the bias by position and time.

    Raises:
        HpgrError: sizes that do not fit together.
    """

    def __init__(
        self,
        layer: type[SequenceLayer],
        num_layers: int,
        *,
        embedding_dim: int,
        num_heads: int,
        dropout: float,
        norm_length: float,
        relative_bias: bool,
    ) -> None:
        super().__init__()
        if embedding_dim % num_heads:
            raise HpgrError(
                f"embedding_dim must be a multiple of num_heads, got {embedding_dim}, {num_heads}"
            )
        check_at_least(1, num_layers=num_layers)
        self.layers = nn.ModuleList(
            layer(embedding_dim=embedding_dim, num_heads=num_heads, dropout=dropout)
            for _ in range(num_layers)
        )
        initialise_linear(self.layers)
        self.bias = RelativeBias(num_layers=num_layers) if relative_bias else None
        self.num_heads = num_heads
        self.alpha = (embedding_dim // num_heads) ** -0.5
        self.norm_length = norm_length

    def forward(self, sequence: TokenSequence, *, mask_position: MaskPosition = "post") -> Tensor:
        """Encode and return the candidates, `[C, D]`, in the order of the sequences.

        Args:
            sequence: the tokens.
            mask_position: where the weights of a plan enter the attention.
        """
        if runs_jagged(sequence.values, self.num_heads):
            return self._encode(self._as_they_are(sequence, mask_position))
        groups = [None] if sequence.row_plan is not None else _length_groups(sequence)
        outputs, places = [], []
        starts = sequence.candidates_per_sequence.cumsum(0) - sequence.candidates_per_sequence
        for chosen in groups:
            part = sequence if chosen is None else sequence.select(chosen)
            outputs.append(self._encode(self._pad(part, mask_position)))
            if chosen is not None:
                places.append(ranges(starts[chosen], part.candidates_per_sequence))
        if not places:
            return outputs[0]
        back = torch.cat(places).argsort()
        return torch.cat(outputs).index_select(0, back)

    def _encode(self, group: TokenGroup) -> Tensor:
        first, final = self.layers[0], len(self.layers) - 1
        if final == 0 or not first.takes_source:
            group = group.expanded()
        x, domains = group.values, group.domains
        for depth, layer in enumerate(self.layers):
            spec = group.last if depth == final else group.spec
            bias = None if self.bias is None else self.bias(depth)
            if depth == 0 and group.source is not None:
                x = layer(x, domains=domains, spec=spec, bias=bias, source=group.source)
                domains = domains[group.source]
            else:
                x = layer(x, domains=domains, spec=spec, bias=bias)
        return x if group.candidate_index is None else x.index_select(0, group.candidate_index)

    def _as_they_are(self, sequence: TokenSequence, mask_position: MaskPosition) -> TokenGroup:
        """The jagged sequences, and who sees whom with what weight."""
        longest, most = _longest(sequence)
        marks = Marks(*sequence.marks_of_tokens().T.contiguous())
        candidate_offsets = sequence.candidate_offsets
        weights = None
        if sequence.row_plan is not None and sequence.parts is not None:
            weights = row_weights(sequence.parts, sequence.row_plan, longest)
        spec = AttentionSpec(
            offsets=sequence.offsets,
            max_length=longest,
            alpha=self.alpha,
            norm_length=self.norm_length,
            visibility=Visibility(marks.key_order, marks.query_order),
            column_weights=sequence.column_weights,
            row_weights=weights,
            weight_offsets=None if weights is None else candidate_offsets,
            mask_position=mask_position,
            places=Places(marks.positions, marks.timestamps),
            exact=True,
        )
        last = spec.replace(
            query_offsets=candidate_offsets,
            max_query_length=most,
            query_rows=sequence.candidate_rows,
        )
        domains = _domains(sequence)
        return TokenGroup(sequence.values, domains, sequence.source, spec, last, None)

    def _pad(self, sequence: TokenSequence, mask_position: MaskPosition) -> TokenGroup:
        """Pad to the longest sequence, and say who sees whom with what weight."""
        lengths, counts = sequence.offsets.diff(), sequence.candidates_per_sequence
        size = len(lengths)
        length, most = _longest(sequence)
        number = torch.arange(size + 1, device=lengths.device)
        marks = Marks(*_pad_marks(sequence, lengths, length).flatten(0, 1).T.contiguous())
        # Candidates are the last tokens of a sequence; the last one is repeated as padding.
        row = (lengths - counts).unsqueeze(1) + torch.arange(most, device=lengths.device)
        row = torch.minimum(row, (lengths - 1).clamp(min=0).unsqueeze(1))
        rows = (row + number[:-1].unsqueeze(1) * length).flatten()
        weights = _weights_of_all_rows(sequence, lengths, length)
        spec = AttentionSpec(
            offsets=number * length,
            max_length=length,
            alpha=self.alpha,
            norm_length=self.norm_length,
            visibility=Visibility(marks.key_order, marks.query_order),
            column_weights=_weights_of_columns(sequence, length),
            row_weights=weights,
            mask_position=mask_position,
            places=Places(marks.positions, marks.timestamps),
            exact=True,
            padded=True,
        )
        last = spec.replace(
            query_offsets=number * most,
            max_query_length=most,
            query_rows=rows,
            row_weights=None if weights is None else weights[rows],
        )
        if sequence.source is None:
            values = jagged_to_padded_dense(sequence.values, sequence.offsets, length).flatten(0, 1)
            domains, source = marks.domains, None
        else:
            values, domains = sequence.values, _domains(sequence)
            source = sequence.source.new_zeros(size, length)  # padding is any token: none sees it
            source[torch.arange(length, device=lengths.device) < lengths.unsqueeze(1)] = (
                sequence.source
            )
            source = source.flatten()
        return TokenGroup(
            values=values,
            domains=domains,
            source=source,
            spec=spec,
            last=last,
            candidate_index=ranges(number[:-1] * most, counts),
        )


def runs_jagged(values: Tensor, num_heads: int) -> bool:
    """Whether attention among `values` `[T, D]` runs on the kernels, which need no padding."""
    sizes = 0, num_heads, values.shape[1] // num_heads
    return attention_backend(values.new_empty(sizes, dtype=product_dtype(values))) == "triton"


def _domains(sequence: TokenSequence) -> Tensor:
    """Of the distinct tokens, int64 `[V]`."""
    return Marks(*sequence.marks.unbind(1)).domains


def _longest(sequence: TokenSequence) -> tuple[int, int]:
    """The most tokens and candidates of a sequence; where unknown, in one wait for the device."""
    if sequence.longest is not None and sequence.most_candidates is not None:
        return sequence.longest, sequence.most_candidates
    lengths, counts = sequence.offsets.diff(), sequence.candidates_per_sequence
    if not len(lengths):
        return 0, 0
    longest, most = torch.stack([lengths.max(), counts.max()]).tolist()
    return longest, most


def _pad_marks(sequence: TokenSequence, lengths: Tensor, length: int) -> Tensor:
    """Marks `[L, 5]` to `[S, N, 5]`."""
    fill = torch.tensor(PADDING_MARKS, device=lengths.device)
    padded = fill.repeat(len(lengths), length, 1)
    inside = torch.arange(length, device=lengths.device) < lengths.unsqueeze(1)
    padded[inside] = sequence.marks_of_tokens()
    return padded


def _weights_of_columns(sequence: TokenSequence, length: int) -> Tensor | None:
    """M `[S * N]` of shortened sequences."""
    if sequence.column_weights is None:
        return None
    weights = sequence.column_weights.unsqueeze(1)
    return jagged_to_padded_dense(weights, sequence.offsets, length).flatten()


def _weights_of_all_rows(sequence: TokenSequence, lengths: Tensor, length: int) -> Tensor | None:
    """M `[S * N, N]` over a shared history: ones, but in the candidates' rows their plan."""
    if sequence.row_plan is None or sequence.parts is None:
        return None
    counts = sequence.candidates_per_sequence
    starts = torch.arange(len(lengths), device=lengths.device) * length
    weights = sequence.row_plan.weights.new_ones(len(lengths) * length, length)
    weights[ranges(starts + lengths - counts, counts)] = row_weights(
        sequence.parts, sequence.row_plan, length
    )
    return weights


def _length_groups(sequence: TokenSequence) -> list[Tensor | None]:
    """Sequences of similar length, as index tensors; `[None]` when one group does."""
    lengths = sequence.offsets.diff()
    order = lengths.argsort(descending=True, stable=True)
    distinct, counts = (part.flip(0).tolist() for part in lengths.unique(return_counts=True))
    sizes = [rows for rows, _, _ in plan_buckets(distinct, counts)]
    return [None] if len(sizes) <= 1 else list(order.split(sizes))
