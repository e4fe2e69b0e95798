"""A stack of HSTU layers that returns only candidates, dense or over what PGSA keeps.

Nothing here waits for the device: lengths are upper bounds, and rows that a selection does not use
are zeros that no sequence owns. So a step of fixed sizes can be captured as a graph (`graphed`),
which pays for small batches, whose kernel launches take longer than their work.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hpgr_plugin.ops.compact import KeptRows, compact
from hpgr_plugin.ops.hstu_attention import AttentionSpec
from hpgr_plugin.ops.hstu_layer import LayerForm, LayerWeights, candidate_layer, hstu_layer
from hpgr_plugin.ops.preference_plan import Selection


def read_sequences(
    rows: Tensor,
    layers: Sequence[LayerWeights],
    spec: AttentionSpec,
    form: LayerForm,
    *,
    candidate_offsets: Tensor,
    candidate_rows: Tensor,
    max_candidates: int,
) -> Tensor:
    """Sequences that end in their candidates, `[R, D]`, to candidates `[C, D]`.

    The last layer computes queries, gate and output of the candidates only.

    Args:
        rows: `[R, D]`.
        layers: one or more.
        spec: of the sequences.
        form: of the layers.
        candidate_offsets: `[B + 1]`.
        candidate_rows: int64 `[C]`, in order.
        max_candidates: an upper bound of the candidates per sequence.
    """
    *inner, last = layers
    for i, weights in enumerate(inner):
        rows = hstu_layer(rows, weights, spec, form.with_draw(2 * i))
    reading = spec.replace(query_offsets=candidate_offsets, max_query_length=max_candidates)
    return hstu_layer(rows, last, reading, form.with_draw(2 * len(inner)), rows=candidate_rows)


def read_histories(
    history: Tensor,
    candidates: Tensor,
    layers: Sequence[LayerWeights],
    specs: tuple[AttentionSpec, AttentionSpec],
    form: LayerForm,
) -> Tensor:
    """Candidates `[C, D]` that read a history `[T, D]`, each by its own weights, and themselves.

    Args:
        history: `[T, D]`.
        candidates: `[C, D]`.
        layers: one or more.
        specs: of the history, and of the candidates over it, see `candidate_layer`.
        form: of the layers.
    """
    tokens = history, candidates
    for i, weights in enumerate(layers):
        last = i == len(layers) - 1
        tokens = candidate_layer(tokens, weights, specs, form.with_draw(2 * i), last=last)
    return tokens[1]


class HSTUStack(nn.Module):
    """Layers in the host's layout; activations have the dtype of the parameters.

    Args:
        embedding_dim: D.
        num_layers: L.
        num_heads: H.
        head_dim: size of a head of q, k, v and u.
        norm_length: n of 1 / n, the longest full sequence.
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        norm_length: int,
    ) -> None:
        super().__init__()
        hidden = num_heads * head_dim
        self.embedding_dim = embedding_dim
        self.form, self.norm_length = LayerForm(num_heads), float(norm_length)
        self.alpha = head_dim**-0.5
        self.layers = nn.ModuleList()
        for _ in range(num_layers):
            projection = torch.empty(embedding_dim, 4 * hidden)
            output = torch.empty(3 * hidden, embedding_dim)
            weights = LayerWeights(
                norm_weight=torch.ones(embedding_dim),
                norm_bias=torch.zeros(embedding_dim),
                projection_weight=nn.init.xavier_uniform_(projection),
                projection_bias=torch.zeros(4 * hidden),
                output_norm_weight=torch.ones(hidden),
                output_norm_bias=torch.zeros(hidden),
                output_weight=nn.init.xavier_uniform_(output),
            )
            self.layers.append(nn.ParameterDict(weights._asdict()))

    def forward(
        self,
        rows: Tensor,
        column_weights: Tensor | None,
        offsets: Tensor,
        *,
        max_length: int,
        exact: bool,
    ) -> Tensor:
        """Sequences `[R, D]`, each ending in its one candidate, to candidates `[C, D]`.

        Args:
            rows: `[R, D]`.
            column_weights: `[R]` float32, or None for a dense stack.
            offsets: `[C + 1]`.
            max_length: an upper bound of the lengths.
            exact: the last sequence ends where the rows end.
        """
        spec = self._spec(offsets, column_weights, max_length, exact)
        return read_sequences(
            rows,
            self._weights(),
            spec,
            self.form,
            candidate_offsets=torch.arange(len(offsets), device=offsets.device),
            candidate_rows=offsets[1:] - 1,
            max_candidates=1,
        )

    def all_rows(self, rows: Tensor, offsets: Tensor, *, max_length: int) -> Tensor:
        """The plain dense stack: `[T, D]` to `[T, D]`."""
        spec = self._spec(offsets, None, max_length, True)
        for weights in self._weights():
            rows = hstu_layer(rows, weights, spec, self.form)
        return rows

    def per_candidate(
        self,
        history: Tensor,
        candidates: Tensor,
        selection: Selection,
        *,
        exact: bool,
        disjoint: bool = False,
    ) -> Tensor:
        """Candidates `[C, D]` over what was selected for each.

        Args:
            history: `[T, D]`, encoded.
            candidates: `[C, D]`, encoded.
            selection: made with its candidates.
            exact: wait for the number of kept rows instead of computing on unused ones too.
            disjoint: one candidate per user, so no history row is selected twice.
        """
        num_rows = int(selection.offsets[-1]) if exact else len(selection.index)
        kept = KeptRows(selection.index, selection.offsets, num_rows, disjoint)
        rows = compact(history, candidates, kept)
        weights = selection.weights[:num_rows]
        return self(rows, weights, selection.offsets, max_length=selection.max_length, exact=exact)

    def shared_history(
        self,
        history: Tensor,
        candidates: Tensor,
        history_offsets: Tensor,
        candidate_offsets: Tensor,
        weight_matrix: Tensor,
        *,
        max_candidates: int,
    ) -> Tensor:
        """Candidates `[C, D]` over the dense history of their user.

        Args:
            history: `[T, D]`, encoded.
            candidates: `[C, D]`, encoded.
            history_offsets: `[B + 1]`.
            candidate_offsets: `[B + 1]`.
            weight_matrix: M `[C, max_history]`.
            max_candidates: an upper bound of the candidates per user.
        """
        spec = self._spec(history_offsets, None, weight_matrix.shape[1], True)
        reading = spec.replace(
            query_offsets=candidate_offsets,
            row_weights=weight_matrix,
            max_query_length=max_candidates,
            causal=False,
        )
        return read_histories(history, candidates, self._weights(), (spec, reading), self.form)

    def _spec(
        self, offsets: Tensor, column_weights: Tensor | None, max_length: int, exact: bool
    ) -> AttentionSpec:
        return AttentionSpec(
            offsets=offsets,
            column_weights=column_weights,
            max_length=max_length,
            alpha=self.alpha,
            norm_length=self.norm_length,
            exact=exact,
        )

    def _weights(self) -> list[LayerWeights]:
        return [LayerWeights(**dict(layer.named_parameters())) for layer in self.layers]


class _FixedShape(nn.Module):
    def __init__(self, stack: HSTUStack, max_length: int) -> None:
        super().__init__()
        self.stack, self.max_length = stack, max_length

    def forward(self, rows: Tensor, column_weights: Tensor, offsets: Tensor) -> Tensor:
        output: Tensor = self.stack(
            rows, column_weights, offsets, max_length=self.max_length, exact=False
        )
        return output


def graphed(stack: HSTUStack, num_rows: int, num_candidates: int, max_length: int) -> Any:
    """`stack(rows, column_weights, offsets)` captured, forward and backward, for fixed sizes.

    Args:
        stack: on a CUDA device.
        num_rows: R of the rows it will be called with, padded with zero rows.
        num_candidates: C.
        max_length: an upper bound of the lengths.

    Returns:
        A callable `(rows [R, D], column_weights [R], offsets [C + 1]) -> [C, D]`.
    """
    parameter = next(stack.parameters())
    device = parameter.device
    rows = torch.randn(
        num_rows, stack.embedding_dim, dtype=parameter.dtype, device=device, requires_grad=True
    )
    column_weights = torch.ones(num_rows, device=device)
    offsets = torch.arange(num_candidates + 1, device=device) * min(
        max_length, num_rows // max(1, num_candidates)
    )
    return torch.cuda.make_graphed_callables(
        _FixedShape(stack, max_length), (rows, column_weights, offsets)
    )
