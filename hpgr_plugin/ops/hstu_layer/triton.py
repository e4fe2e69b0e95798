"""HSTU layers on kernels.

Matrix products go to the library's kernels; attention and gating write their gradients straight
into the gradient of the projections, so nothing is concatenated.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hpgr_plugin.ops.hstu_attention.spec import AttentionSpec
from hpgr_plugin.ops.hstu_attention.triton import (
    attention_backward,
    attention_forward,
    zero_spare_rows,
)
from hpgr_plugin.ops.hstu_attention.triton import why_not_plain as why_not_attention
from hpgr_plugin.ops.hstu_layer.layer import LayerForm, LayerWeights, Specs, Tokens
from hpgr_plugin.ops.hstu_layer.rowwise import (
    Norm,
    gate_backward,
    gate_forward,
    norm_backward,
    norm_forward,
    scale_rows,
)


class _Form(NamedTuple):
    """What the autograd functions need beside tensors."""

    spec: AttentionSpec
    num_heads: int
    eps: float


class _Gated(NamedTuple):
    """The gated output `[R, 3 H dv]`, what was attended to `[R, H dv]`, and its moments."""

    output: Tensor
    attended: Tensor
    moments: Tensor


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
    if rows is not None:
        output: Tensor = _LastLayer.apply(x, rows, _Form(spec, *form), *weights)
        return output
    normed, residual = Norm.apply(x, weights.norm_weight, weights.norm_bias, form.eps)
    projected = torch.addmm(weights.projection_bias, normed, weights.projection_weight)
    norm = weights.output_norm_weight, weights.output_norm_bias
    gated = _AttendAndGate.apply(projected, *norm, _Form(spec, *form))
    return torch.addmm(residual, gated, weights.output_weight)


def candidate_layer(
    tokens: Tokens, weights: LayerWeights, specs: Specs, form: LayerForm, *, last: bool
) -> Tokens:
    """See `hpgr_plugin.ops.hstu_layer.candidate_layer`."""
    history, candidates = tokens
    norm = weights.norm_weight, weights.norm_bias, form.eps
    output_norm = weights.output_norm_weight, weights.output_norm_bias
    projection = weights.projection_bias, weights.projection_weight
    own_form, read_form = (_Form(spec, *form) for spec in specs)
    normed_candidates, candidate_residual = Norm.apply(candidates, *norm)
    own = torch.addmm(projection[0], normed_candidates, projection[1])
    normed, residual = Norm.apply(history, *norm)
    if last:
        # Nobody reads the history's own rows any more: only its keys and values are projected.
        hidden = weights.output_norm_weight.numel()
        (_, value_bias, _, key_bias), (_, value, _, key) = (_split(p, hidden) for p in projection)
        keys = torch.addmm(torch.cat([value_bias, key_bias]), normed, torch.cat([value, key], 1))
        read = _Read.apply(own, keys, *output_norm, read_form)
        return history, torch.addmm(candidate_residual, read, weights.output_weight)
    projected = torch.addmm(projection[0], normed, projection[1])
    gated, read = _AttendAndRead.apply(projected, own, *output_norm, own_form, read_form)
    out = torch.addmm(candidate_residual, read, weights.output_weight)
    return torch.addmm(residual, gated, weights.output_weight), out


class _AttendAndGate(torch.autograd.Function):
    """Projections `[T, 2 H (dv + d)]` to the gated output `[T, 3 H dv]`."""

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, norm_weight: Tensor, norm_bias: Tensor, form: _Form
    ) -> Tensor:
        gated = _gate(projected, norm_weight, norm_bias, form)
        ctx.save_for_backward(projected, norm_weight, norm_bias, *gated[1:])
        ctx.form = form
        return gated.output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return *_gate_slope(grad, ctx.saved_tensors, ctx.form), None


class _Read(torch.autograd.Function):
    """Candidates that read a history of values and keys, and themselves: `[C, 3 H dv]`."""

    @staticmethod
    def forward(
        ctx: Any, own: Tensor, columns: Tensor, norm_weight: Tensor, norm_bias: Tensor, form: _Form
    ) -> Tensor:
        v, k = _halves(columns, norm_weight.numel())
        read = _read(own, k, v, norm_weight, norm_bias, form)
        ctx.save_for_backward(columns, own, norm_weight, norm_bias, *read[1:])
        ctx.form = form
        return read.output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        columns, *saved = ctx.saved_tensors
        hidden = saved[1].numel()
        d_columns = torch.empty_like(columns)
        zero_spare_rows(d_columns, ctx.form.spec)
        (v, k), (dv, dk) = _halves(columns, hidden), _halves(d_columns, hidden)
        d_own, d_weight, d_bias = _read_slope(grad, saved, (k, v, dk, dv), ctx.form)
        return d_own, d_columns, d_weight, d_bias, None


class _AttendAndRead(torch.autograd.Function):
    """`_AttendAndGate` of the history and `_Read` of its candidates, one gradient for both."""

    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        own: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        form: _Form,
        read_form: _Form,
    ) -> tuple[Tensor, Tensor]:
        gated = _gate(projected, norm_weight, norm_bias, form)
        _, v, _, k = _split(projected, norm_weight.numel())
        read = _read(own, k, v, norm_weight, norm_bias, read_form)
        ctx.save_for_backward(projected, own, norm_weight, norm_bias, *gated[1:], *read[1:])
        ctx.forms = form, read_form
        return gated.output, read.output

    @staticmethod
    def backward(ctx: Any, grad: Tensor, read_grad: Tensor) -> tuple[Tensor | None, ...]:
        projected, own, *norm, attended, moments, read_attended, read_moments = ctx.saved_tensors
        form, read_form = ctx.forms
        d_projected, d_weight, d_bias = _gate_slope(
            grad, (projected, *norm, attended, moments), form
        )
        _, v, _, k = _split(projected, norm[0].numel())
        _, dv, _, dk = _split(d_projected, norm[0].numel())
        d_own, read_d_weight, read_d_bias = _read_slope(
            read_grad, (own, *norm, read_attended, read_moments), (k, v, dk, dv), read_form,
            accumulate=True,
        )  # fmt: skip
        return d_projected, d_own, d_weight + read_d_weight, d_bias + read_d_bias, None, None


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
        gated, gate_moments = gate_forward(
            attended, u, weights.output_norm_weight, weights.output_norm_bias, form.eps
        )
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
            weights.output_norm_bias, gate_moments, du,
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


def _gate(projected: Tensor, norm_weight: Tensor, norm_bias: Tensor, form: _Form) -> _Gated:
    """Attention and gate of a history; scales its keys or values in place."""
    hidden = norm_weight.numel()
    u, v, q, k = _split(projected, hidden)
    attended = projected.new_empty(len(projected), hidden)
    zero_spare_rows(attended, form.spec)
    _scale(k, v, form.spec)
    _attend(q, k, v, attended, form)
    gated, moments = gate_forward(attended, u, norm_weight, norm_bias, form.eps)
    return _Gated(gated, attended, moments)


def _gate_slope(
    grad: Tensor, saved: tuple[Tensor, ...], form: _Form
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the projections and of the norm."""
    projected, norm_weight, norm_bias, attended, moments = saved
    hidden = norm_weight.numel()
    d_projected = torch.empty_like(projected)
    zero_spare_rows(d_projected, form.spec)
    u, v, q, k = _split(projected, hidden)
    du, dv, dq, dk = _split(d_projected, hidden)
    d_attended, d_weight, d_bias = gate_backward(
        grad.contiguous(), attended, u, norm_weight, norm_bias, moments, du
    )
    _attend_slope((d_attended, q, k, v, dq, dk, dv), form)
    return d_projected, d_weight, d_bias


def _read(
    own: Tensor, k: Tensor, v: Tensor, norm_weight: Tensor, norm_bias: Tensor, form: _Form
) -> _Gated:
    """Attention of candidates over a history and themselves, and their gate."""
    hidden = norm_weight.numel()
    u, own_v, q, own_k = _split(own, hidden)
    attended = own.new_empty(len(own), hidden)
    zero_spare_rows(attended, form.spec, of_queries=True)
    _attend(q, k, v, attended, form)
    q, own_k, own_v = (x.float() for x in _heads(form, q, own_k, own_v))
    score = (q * own_k).sum(-1, keepdim=True) * form.spec.alpha
    of_itself = F.silu(score) / form.spec.norm_length * own_v
    attended = (_heads(form, attended)[0].float() + of_itself).flatten(1).to(own.dtype)
    gated, moments = gate_forward(attended, u, norm_weight, norm_bias, form.eps)
    return _Gated(gated, attended, moments)


def _read_slope(
    grad: Tensor,
    saved: tuple[Tensor, ...],
    columns: tuple[Tensor, Tensor, Tensor, Tensor],
    form: _Form,
    *,
    accumulate: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the candidates' projections and of the norm; dk and dv are written.

    Args:
        grad: of the gated output.
        saved: candidates' projections, norm, what was attended to, and its moments.
        columns: k, v, dk and dv of the history.
        form: of the reading.
        accumulate: add to dk and dv.
    """
    own, norm_weight, norm_bias, attended, moments = saved
    k, v, dk, dv = columns
    spec, hidden = form.spec, norm_weight.numel()
    d_own = torch.empty_like(own)
    zero_spare_rows(d_own, spec, of_queries=True)
    u, own_v, q, own_k = _split(own, hidden)
    du, d_own_v, dq, d_own_k = _split(d_own, hidden)
    d_attended, d_weight, d_bias = gate_backward(
        grad.contiguous(), attended, u, norm_weight, norm_bias, moments, du
    )
    _attend_slope((d_attended, q, k, v, dq, dk, dv), form, accumulate=accumulate)
    q, own_k, own_v, d_attended = (x.float() for x in _heads(form, q, own_k, own_v, d_attended))
    score = (q * own_k).sum(-1, keepdim=True) * spec.alpha
    sigmoid = torch.sigmoid(score)
    of_itself = score * sigmoid / spec.norm_length
    slope = sigmoid * (1.0 + score * (1.0 - sigmoid)) * (spec.alpha / spec.norm_length)
    d_score = (d_attended * own_v).sum(-1, keepdim=True) * slope
    d_own_v.copy_((d_attended * of_itself).flatten(1))
    d_own_k.copy_((d_score * q).flatten(1))
    dq.add_((d_score * own_k).flatten(1).to(dq.dtype))
    return d_own, d_weight, d_bias


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
    u, v, q, k = _split(parameter, hidden)
    return torch.cat([u, q], -1), torch.cat([v, k], -1)


def _by_projection(of_rows: Tensor, of_columns: Tensor, hidden: int) -> Tensor:
    """The inverse of `_by_use`."""
    parts = (of_rows[..., :hidden], of_columns[..., :hidden], of_rows[..., hidden:],
             of_columns[..., hidden:])  # fmt: skip
    return torch.cat(parts, -1)


def _heads(form: _Form, *tensors: Tensor) -> list[Tensor]:
    heads = form.num_heads
    return [x.view(len(x), heads, x.shape[1] // heads) for x in tensors]
