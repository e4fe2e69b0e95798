"""HSTU layers on kernels.

Matrix products go to the library's kernels; attention and gating write their gradients straight
into the gradient of the projections, so nothing is concatenated. A layer is one autograd function:
it decides itself what it keeps for the backward, and what it computes again.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpgr_plugin.ops.hstu_attention.spec import AttentionSpec
from hpgr_plugin.ops.hstu_attention.triton import (
    attention_backward,
    attention_forward,
    zero_spare_rows,
)
from hpgr_plugin.ops.hstu_attention.triton import why_not_plain as why_not_attention
from hpgr_plugin.ops.hstu_layer.layer import Dropout, LayerForm, LayerWeights, Specs, Tokens
from hpgr_plugin.ops.hstu_layer.rowwise import (
    gate_backward,
    gate_forward,
    norm_backward,
    norm_forward,
    own_backward,
    own_forward,
    scale_rows,
)

_NUM_WEIGHTS = len(LayerWeights._fields)


class _Form(NamedTuple):
    """What the autograd functions need beside tensors."""

    spec: AttentionSpec
    num_heads: int
    eps: float
    dropout: Dropout | None
    recompute: bool


class _Rows(NamedTuple):
    """What a layer computes on its rows; the last three can be computed again from the others.

    Attributes:
        x: `[T, D]`, the input.
        moments: `[T, 2]` of its norm.
        attended: `[T, H dv]`.
        gate_moments: `[T, 2]` of its norm.
        normed: `[T, D]`.
        projected: u, v, q, k `[T, 2 H (dv + d)]`, keys or values scaled.
        gated: `[T, 3 H dv]`.
    """

    x: Tensor
    moments: Tensor
    attended: Tensor
    gate_moments: Tensor
    normed: Tensor
    projected: Tensor
    gated: Tensor


_KEPT = 4  # fields of _Rows that are kept with `recompute`


def why_not(
    x: Tensor, weights: LayerWeights, spec: AttentionSpec, form: LayerForm, rows: Tensor | None
) -> str | None:
    """Why the kernels do not support the case, or None."""
    hidden = weights.output_norm_weight.numel()
    attention = weights.projection_bias.numel() // 2 - hidden
    q, v = (x.new_empty(0, form.num_heads, size // form.num_heads) for size in (attention, hidden))
    return why_not_attention(q, q, v, spec)


def why_not_candidate_layer(
    tokens: Tokens, weights: LayerWeights, specs: Specs, form: LayerForm, *, last: bool
) -> str | None:
    """The same for `candidate_layer`."""
    reasons = (why_not(tokens[0], weights, spec, form, None) for spec in specs)
    return next((reason for reason in reasons if reason is not None), None)


def hstu_layer(
    x: Tensor, weights: LayerWeights, spec: AttentionSpec, form: LayerForm, rows: Tensor | None
) -> Tensor:
    """See `hpgr_plugin.ops.hstu_layer.hstu_layer`."""
    own = _Form(spec, *form)
    if rows is None:
        output: Tensor = _Layer.apply(x, own, *weights)
    else:
        output = _LastLayer.apply(x, rows, own, *weights)
    return output


def candidate_layer(
    tokens: Tokens, weights: LayerWeights, specs: Specs, form: LayerForm, *, last: bool
) -> Tokens:
    """See `hpgr_plugin.ops.hstu_layer.candidate_layer`."""
    history, candidates = tokens
    own = _Form(specs[0], *form)
    draw = 0 if form.dropout is None else form.dropout.draw
    read = _Form(specs[1], *form.with_draw(draw + 1))
    if last:
        return history, _LastCandidateLayer.apply(history, candidates, read, *weights)
    output: Tokens = _CandidateLayer.apply(history, candidates, own, read, *weights)
    return output


class _Layer(torch.autograd.Function):
    """All rows `[T, D]` of sequences to all rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, form: _Form, *parameters: Tensor) -> Tensor:
        weights = LayerWeights(*parameters)
        rows = _sequence_rows(x.contiguous(), weights, form)
        ctx.save_for_backward(*_kept(rows, form), *parameters)
        ctx.form = form
        return torch.addmm(rows.x, rows.gated, weights.output_weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights = LayerWeights(*ctx.saved_tensors[-_NUM_WEIGHTS:])
        rows = _complete(ctx.saved_tensors[:-_NUM_WEIGHTS], weights, ctx.form)
        grad = grad.contiguous()
        d_projected, of_gate = _sequence_slope(grad, rows, weights, ctx.form)
        dx, of_input = _input_slope(d_projected, grad, rows, weights)
        return dx, None, *of_input, *of_gate


class _CandidateLayer(torch.autograd.Function):
    """A history `[T, D]`, and candidates `[C, D]` that read it."""

    @staticmethod
    def forward(
        ctx: Any,
        history: Tensor,
        candidates: Tensor,
        form: _Form,
        read_form: _Form,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        weights = LayerWeights(*parameters)
        rows = _sequence_rows(history.contiguous(), weights, form)
        _, v, _, k = _split(rows.projected, weights.output_norm_weight.numel())
        own = _candidate_rows(candidates.contiguous(), (k, v), weights, read_form)
        kept = _kept(rows, form)
        ctx.save_for_backward(*own, *kept, *parameters)
        ctx.forms = form, read_form
        return (
            torch.addmm(rows.x, rows.gated, weights.output_weight),
            torch.addmm(own.x, own.gated, weights.output_weight),
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor, read_grad: Tensor) -> tuple[Tensor | None, ...]:
        form, read_form = ctx.forms
        weights = LayerWeights(*ctx.saved_tensors[-_NUM_WEIGHTS:])
        own = _Rows(*ctx.saved_tensors[: len(_Rows._fields)])
        rows = _complete(ctx.saved_tensors[len(own) : -_NUM_WEIGHTS], weights, form)
        grad, read_grad = grad.contiguous(), read_grad.contiguous()
        hidden = weights.output_norm_weight.numel()
        d_projected, of_gate = _sequence_slope(grad, rows, weights, form)
        (_, v, _, k), (_, dv, _, dk) = (_split(p, hidden) for p in (rows.projected, d_projected))
        d_own, own_gate = _candidate_slope(
            read_grad, own, (k, v, dk, dv), weights, read_form, accumulate=True
        )
        dx, of_input = _input_slope(d_projected, grad, rows, weights)
        d_candidates, own_input = _input_slope(d_own, read_grad, own, weights)
        return dx, d_candidates, None, None, *_sums([*of_input, *of_gate], [*own_input, *own_gate])


class _LastCandidateLayer(torch.autograd.Function):
    """Only the candidates: nobody reads the history's own rows any more.

    Of the history, only keys and values are projected.
    """

    @staticmethod
    def forward(
        ctx: Any, history: Tensor, candidates: Tensor, form: _Form, *parameters: Tensor
    ) -> Tensor:
        weights = LayerWeights(*parameters)
        hidden = weights.output_norm_weight.numel()
        column_weight = _of_columns(weights.projection_weight, hidden)
        column_bias = _of_columns(weights.projection_bias, hidden)
        history = history.contiguous()
        normed, moments = norm_forward(history, weights.norm_weight, weights.norm_bias, form.eps)
        columns = torch.addmm(column_bias, normed, column_weight)
        v, k = _halves(columns, hidden)
        _scale(k, v, form.spec)
        own = _candidate_rows(candidates.contiguous(), (k, v), weights, form)
        ctx.save_for_backward(*own, history, normed, moments, columns, column_weight, *parameters)
        ctx.form = form
        return torch.addmm(own.x, own.gated, weights.output_weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights = LayerWeights(*ctx.saved_tensors[-_NUM_WEIGHTS:])
        own = _Rows(*ctx.saved_tensors[: len(_Rows._fields)])
        history, normed, moments, columns, column_weight = ctx.saved_tensors[
            len(own) : -_NUM_WEIGHTS
        ]
        hidden = weights.output_norm_weight.numel()
        grad = grad.contiguous()
        d_columns = torch.empty_like(columns)
        zero_spare_rows(d_columns, ctx.form.spec)
        (v, k), (dv, dk) = _halves(columns, hidden), _halves(d_columns, hidden)
        d_own, of_gate = _candidate_slope(grad, own, (k, v, dk, dv), weights, ctx.form)
        d_candidates, of_input = _input_slope(d_own, grad, own, weights)
        dx, d_norm_weight, d_norm_bias = norm_backward(
            d_columns @ column_weight.t(), None, history, weights.norm_weight, moments
        )
        d_weight, d_bias = of_input[2:]
        _by_use_add(d_weight, normed.t() @ d_columns, hidden)
        _by_use_add(d_bias, d_columns.sum(0), hidden)
        of_norm = _sums([d_norm_weight, d_norm_bias], of_input[:2])
        return dx, d_candidates, None, *of_norm, d_weight, d_bias, *of_gate


class _LastLayer(torch.autograd.Function):
    """A whole layer for some rows: keys and values of all rows, the rest only of those."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, form: _Form, *parameters: Tensor) -> Tensor:
        weights = LayerWeights(*parameters)
        hidden = weights.output_norm_weight.numel()
        row_weight, column_weight = _by_use(weights.projection_weight, hidden)
        row_bias, column_bias = _by_use(weights.projection_bias, hidden)
        x = x.contiguous()
        normed, moments = norm_forward(x, weights.norm_weight, weights.norm_bias, form.eps)
        normed_rows = normed[rows]
        queries = torch.addmm(row_bias, normed_rows, row_weight)
        columns = torch.addmm(column_bias, normed, column_weight)
        (u, q), (v, k) = _halves(queries, hidden), _halves(columns, hidden)
        attended = queries.new_empty(len(rows), hidden)
        _scale(k, v, form.spec)
        _attend(q, k, v, attended, form)
        gated, gate_moments = _gate(attended, u, weights, form)
        ctx.save_for_backward(
            x, rows, normed, moments, normed_rows, queries, columns, attended, gated, gate_moments,
            row_weight, column_weight, *parameters,
        )  # fmt: skip
        ctx.form = form
        return torch.addmm(x[rows], gated, weights.output_weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, rows, normed, moments, normed_rows, queries, columns, attended, gated, gate_moments,
         row_weight, column_weight, *parameters) = ctx.saved_tensors  # fmt: skip
        weights = LayerWeights(*parameters)
        hidden = weights.output_norm_weight.numel()
        grad = grad.contiguous()
        d_queries, d_columns = torch.empty_like(queries), torch.empty_like(columns)
        zero_spare_rows(d_columns, ctx.form.spec)
        (u, q), (v, k) = _halves(queries, hidden), _halves(columns, hidden)
        (du, dq), (dv, dk) = _halves(d_queries, hidden), _halves(d_columns, hidden)
        d_attended, d_gate_weight, d_gate_bias = gate_backward(
            grad @ weights.output_weight.t(), attended, u, weights.output_norm_weight,
            weights.output_norm_bias, gate_moments, du, ctx.form.dropout,
        )  # fmt: skip
        _attend_slope((d_attended, q, k, v, dq, dk, dv), ctx.form)
        d_normed = d_columns @ column_weight.t()
        d_normed.index_add_(0, rows, d_queries @ row_weight.t())
        dx, d_norm_weight, d_norm_bias = norm_backward(
            d_normed, None, x, weights.norm_weight, moments
        )
        dx.index_add_(0, rows, grad)
        d_weight = _by_projection(normed_rows.t() @ d_queries, normed.t() @ d_columns, hidden)
        d_bias = _by_projection(d_queries.sum(0), d_columns.sum(0), hidden)
        return (
            dx, None, None, d_norm_weight, d_norm_bias, d_weight, d_bias, d_gate_weight,
            d_gate_bias, gated.t() @ grad,
        )  # fmt: skip


def _sequence_rows(x: Tensor, weights: LayerWeights, form: _Form) -> _Rows:
    """The rows of sequences that read themselves."""
    normed, moments, projected = _project(x, weights, form)
    u, v, q, k = _split(projected, weights.output_norm_weight.numel())
    _scale(k, v, form.spec)
    attended = x.new_empty(u.shape)
    zero_spare_rows(attended, form.spec)
    _attend(q, k, v, attended, form)
    gated, gate_moments = _gate(attended, u, weights, form)
    return _Rows(x, moments, attended, gate_moments, normed, projected, gated)


def _sequence_slope(
    grad: Tensor, rows: _Rows, weights: LayerWeights, form: _Form
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the projections; and of output norm and output weight."""
    d_projected = torch.empty_like(rows.projected)
    zero_spare_rows(d_projected, form.spec)
    u, v, q, k = _split(rows.projected, rows.attended.shape[1])
    du, dv, dq, dk = _split(d_projected, rows.attended.shape[1])
    d_attended, of_gate = _gate_slope(grad, rows, (u, du), weights, form)
    _attend_slope((d_attended, q, k, v, dq, dk, dv), form)
    return d_projected, of_gate


def _candidate_rows(
    x: Tensor, columns: tuple[Tensor, Tensor], weights: LayerWeights, form: _Form
) -> _Rows:
    """The rows of candidates that read keys and values of a history, and themselves."""
    normed, moments, projected = _project(x, weights, form)
    u, own_v, q, own_k = _split(projected, weights.output_norm_weight.numel())
    attended = x.new_empty(u.shape)
    zero_spare_rows(attended, form.spec, of_queries=True)
    _attend(q, *columns, attended, form)
    spec = form.spec
    own_forward(q, own_k, own_v, attended, form.num_heads, spec.alpha, spec.norm_length)
    gated, gate_moments = _gate(attended, u, weights, form)
    return _Rows(x, moments, attended, gate_moments, normed, projected, gated)


def _candidate_slope(
    grad: Tensor,
    rows: _Rows,
    columns: tuple[Tensor, Tensor, Tensor, Tensor],
    weights: LayerWeights,
    form: _Form,
    *,
    accumulate: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """`_sequence_slope` of candidates; dk and dv of the history are written.

    Args:
        grad: of the candidates' output.
        rows: of the candidates.
        columns: k, v, dk and dv of the history.
        weights: of the layer.
        form: of the reading.
        accumulate: add to dk and dv.
    """
    k, v, dk, dv = columns
    spec = form.spec
    d_projected = torch.empty_like(rows.projected)
    zero_spare_rows(d_projected, spec, of_queries=True)
    u, own_v, q, own_k = _split(rows.projected, rows.attended.shape[1])
    du, d_own_v, dq, d_own_k = _split(d_projected, rows.attended.shape[1])
    d_attended, of_gate = _gate_slope(grad, rows, (u, du), weights, form)
    _attend_slope((d_attended, q, k, v, dq, dk, dv), form, accumulate=accumulate)
    own_backward(
        d_attended, (q, own_k, own_v), (dq, d_own_k, d_own_v), form.num_heads, spec.alpha,
        spec.norm_length,
    )  # fmt: skip
    return d_projected, of_gate


def _project(x: Tensor, weights: LayerWeights, form: _Form) -> tuple[Tensor, Tensor, Tensor]:
    """The normed rows, their moments, and u, v, q, k side by side."""
    normed, moments = norm_forward(x, weights.norm_weight, weights.norm_bias, form.eps)
    return normed, moments, torch.addmm(weights.projection_bias, normed, weights.projection_weight)


def _input_slope(
    d_projected: Tensor, residual: Tensor, rows: _Rows, weights: LayerWeights
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of x; and of norm, projection weight and bias, in the order of the weights."""
    dx, d_norm_weight, d_norm_bias = norm_backward(
        d_projected @ weights.projection_weight.t(), residual, rows.x, weights.norm_weight,
        rows.moments,
    )  # fmt: skip
    of_projection = rows.normed.t() @ d_projected, d_projected.sum(0)
    return dx, [d_norm_weight, d_norm_bias, *of_projection]


def _gate(attended: Tensor, u: Tensor, weights: LayerWeights, form: _Form) -> tuple[Tensor, Tensor]:
    norm = weights.output_norm_weight, weights.output_norm_bias
    return gate_forward(attended, u, *norm, form.eps, form.dropout)


def _gate_slope(
    grad: Tensor, rows: _Rows, gate: tuple[Tensor, Tensor], weights: LayerWeights, form: _Form
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of what was attended to; and of output norm and output weight.

    Args:
        grad: of the layer's output.
        rows: of the forward.
        gate: u, and where its gradient is written.
        weights: of the layer.
        form: of the layer.
    """
    u, du = gate
    d_attended, d_norm_weight, d_norm_bias = gate_backward(
        grad @ weights.output_weight.t(), rows.attended, u, weights.output_norm_weight,
        weights.output_norm_bias, rows.gate_moments, du, form.dropout,
    )  # fmt: skip
    return d_attended, [d_norm_weight, d_norm_bias, rows.gated.t() @ grad]


def _kept(rows: _Rows, form: _Form) -> tuple[Tensor, ...]:
    """What is saved for the backward."""
    return rows[:_KEPT] if form.recompute else rows


def _complete(kept: tuple[Tensor, ...], weights: LayerWeights, form: _Form) -> _Rows:
    """The rows of sequences from what was saved."""
    if not form.recompute:
        return _Rows(*kept)
    x, moments, attended, gate_moments = kept
    normed, _, projected = _project(x, weights, form)
    u, v, _, k = _split(projected, attended.shape[1])
    _scale(k, v, form.spec)
    gated, _ = _gate(attended, u, weights, form)
    return _Rows(x, moments, attended, gate_moments, normed, projected, gated)


def _sums(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """Sums of tensors pair by pair, in as few launches as they have dtypes."""
    sums: list[Tensor | None] = [None] * len(first)
    for dtype in {x.dtype for x in first}:
        places = [i for i, x in enumerate(first) if x.dtype == dtype]
        added = torch._foreach_add([first[i] for i in places], [second[i] for i in places])
        for i, x in zip(places, added, strict=True):
            sums[i] = x
    return [x for x in sums if x is not None]


def _scale(k: Tensor, v: Tensor, spec: AttentionSpec) -> None:
    """Apply the column weights in place to fresh projections, which are not used unscaled."""
    if spec.column_weights is not None:
        scaled = k if spec.mask_position == "pre" else v
        scale_rows(scaled, spec.column_weights, scaled)


def _attend(q: Tensor, k: Tensor, v: Tensor, attended: Tensor, form: _Form) -> None:
    q, k, v, attended = _heads(form, q, k, v, attended)
    attention_forward(q, k, v, attended, form.spec)


def _attend_slope(tensors: tuple[Tensor, ...], form: _Form, *, accumulate: bool = False) -> None:
    """Of the gradient, q, k and v, write dq, dk and dv."""
    grad, q, k, v, dq, dk, dv = _heads(form, *tensors)
    attention_backward(grad, q, k, v, dq, dk, dv, form.spec, accumulate=accumulate)


def _split(projected: Tensor, hidden: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, v, q, k of projections, of their weight or of their bias."""
    attention = projected.shape[-1] // 2 - hidden
    u, v, q, k = projected.split([hidden, hidden, attention, attention], dim=-1)
    return u, v, q, k


def _halves(projected: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    """u and q, or v and k, where they were projected without the others."""
    return projected[:, :hidden], projected[:, hidden:]


def _by_use(parameter: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    """What makes u and q (of the rows that are read), and v and k (of the columns)."""
    u, _, q, _ = _split(parameter, hidden)
    return torch.cat([u, q], -1), _of_columns(parameter, hidden)


def _of_columns(parameter: Tensor, hidden: int) -> Tensor:
    _, v, _, k = _split(parameter, hidden)
    return torch.cat([v, k], -1)


def _by_projection(of_rows: Tensor, of_columns: Tensor, hidden: int) -> Tensor:
    """The inverse of `_by_use`."""
    parts = (of_rows[..., :hidden], of_columns[..., :hidden], of_rows[..., hidden:],
             of_columns[..., hidden:])  # fmt: skip
    return torch.cat(parts, -1)


def _by_use_add(parameter: Tensor, of_columns: Tensor, hidden: int) -> None:
    """Add the second part of `_by_use` to what has the layout of the parameter."""
    _, v, _, k = _split(parameter, hidden)
    dv, dk = of_columns[..., :hidden], of_columns[..., hidden:]
    v.add_(dv)
    k.add_(dk)


def _heads(form: _Form, *tensors: Tensor) -> list[Tensor]:
    heads = form.num_heads
    return [x.view(len(x), heads, x.shape[1] // heads) for x in tensors]
