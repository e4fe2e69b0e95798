"""One HSTU layer on these kernels: norm, projections, attention, gated output, residual.

The layout is the host's: projections u, v, q, k side by side, output from
`[SiLU(u), a, SiLU(u) * norm(a)]`, residual added. Products go to the library's matrix kernels;
attention and gating write their gradients straight into the gradient of the projections.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hpgr_plugin.ops.hstu_attention import AttentionSpec
from hpgr_plugin.ops.hstu_attention.triton import (
    attention_backward,
    attention_forward,
    zero_spare_rows,
)
from hpgr_plugin.ops.hstu_layer.rowwise import (
    Norm,
    gate_backward,
    gate_forward,
    norm_backward,
    norm_forward,
    scale_rows,
)


class LayerWeights(NamedTuple):
    """Weights of a layer of width D with H heads of sizes dv (u, v) and d (q, k)."""

    norm_weight: Tensor  # [D]
    norm_bias: Tensor  # [D]
    projection_weight: Tensor  # [D, 2 H (dv + d)]: u, v, q, k
    projection_bias: Tensor  # [2 H (dv + d)]
    output_norm_weight: Tensor  # [H dv]
    output_norm_bias: Tensor  # [H dv]
    output_weight: Tensor  # [3 H dv, D]


def hstu_layer(
    x: Tensor, weights: LayerWeights, spec: AttentionSpec, *, num_heads: int, eps: float = 1e-6
) -> Tensor:
    """All rows `[T, D]` to `[T, D]`."""
    normed, residual = Norm.apply(x, weights.norm_weight, weights.norm_bias, eps)
    projected = torch.addmm(weights.projection_bias, normed, weights.projection_weight)
    gated = _AttendAndGate.apply(
        projected, weights.output_norm_weight, weights.output_norm_bias, spec, num_heads, eps
    )
    return torch.addmm(residual, gated, weights.output_weight)


def hstu_last_layer(
    x: Tensor,
    rows: Tensor,
    weights: LayerWeights,
    spec: AttentionSpec,
    *,
    num_heads: int,
    eps: float = 1e-6,
) -> Tensor:
    """The rows that are read afterwards alone: keys and values of all, the rest of those.

    Args:
        x: `[T, D]`.
        rows: `[R]` int64, no row twice: the last of every sequence, as many as
            `spec.query_offsets` says.

    Returns:
        `[R, D]`.
    """
    output: Tensor = _LastLayer.apply(x, rows, spec, num_heads, eps, *weights)
    return output


def candidate_layer(
    history: Tensor,
    candidates: Tensor,
    weights: LayerWeights,
    spec: AttentionSpec,
    reading: AttentionSpec,
    *,
    num_heads: int,
    last: bool,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """One layer of the candidate layout: a dense history, shared, and candidates that read it.

    Args:
        history: `[T, D]`; after the last layer nobody reads it, and it comes back as it was.
        candidates: `[C, D]`: each reads the history by its own weights, and itself.
        spec: of the history.
        reading: `cross`, of the candidates over the history.
        last: whether only the candidates are wanted.
    """
    hidden = weights.output_norm_weight.numel()
    norm = weights.norm_weight, weights.norm_bias, eps
    gate_norm = weights.output_norm_weight, weights.output_norm_bias
    normed_candidates, candidate_residual = Norm.apply(candidates, *norm)
    asking = torch.addmm(weights.projection_bias, normed_candidates, weights.projection_weight)
    normed, residual = Norm.apply(history, *norm)
    if last:
        _, value_weight, _, key_weight = _split(weights.projection_weight, hidden)
        _, value_bias, _, key_bias = _split(weights.projection_bias, hidden)
        keys = torch.addmm(
            torch.cat([value_bias, key_bias]), normed, torch.cat([value_weight, key_weight], 1)
        )
        gated = None
        read = _Read.apply(asking, keys, *gate_norm, reading, num_heads, eps)
    else:
        projected = torch.addmm(weights.projection_bias, normed, weights.projection_weight)
        gated, read = _AttendAndRead.apply(
            projected, asking, *gate_norm, spec, reading, num_heads, eps
        )
    out = torch.addmm(candidate_residual, read, weights.output_weight)
    if gated is None:
        return history, out
    return torch.addmm(residual, gated, weights.output_weight), out


class _AttendAndGate(torch.autograd.Function):
    """Projections `[T, 2 H (dv + d)]` to the gated output `[T, 3 H dv]`."""

    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        spec: AttentionSpec,
        num_heads: int,
        eps: float,
    ) -> Tensor:
        hidden = norm_weight.numel()
        u, v, q, k = _split(projected, hidden)
        attended = projected.new_empty(len(projected), hidden)
        zero_spare_rows(attended, spec)
        _scale(k, v, spec)
        _attend(num_heads, q, k, v, attended, spec)
        gated, moments = gate_forward(attended, u, norm_weight, norm_bias, eps)
        ctx.save_for_backward(projected, norm_weight, norm_bias, attended, moments)
        ctx.spec, ctx.num_heads = spec, num_heads
        return gated

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        projected, norm_weight, norm_bias, attended, moments = ctx.saved_tensors
        hidden = norm_weight.numel()
        d_projected = torch.empty_like(projected)
        zero_spare_rows(d_projected, ctx.spec)
        u, v, q, k = _split(projected, hidden)
        du, dv, dq, dk = _split(d_projected, hidden)
        d_attended, d_weight, d_bias = gate_backward(
            grad.contiguous(), attended, u, norm_weight, norm_bias, moments, du
        )
        _attend_backward(ctx.num_heads, d_attended, q, k, v, dq, dk, dv, ctx.spec)
        return d_projected, d_weight, d_bias, None, None, None


class _LastLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Tensor,
        spec: AttentionSpec,
        num_heads: int,
        eps: float,
        *parameters: Tensor,
    ) -> Tensor:
        weights = LayerWeights(*parameters)
        hidden = weights.output_norm_weight.numel()
        row_weight, column_weight = _by_use(weights.projection_weight, hidden)
        row_bias, column_bias = _by_use(weights.projection_bias, hidden)
        x = x.contiguous()
        normed, moments = norm_forward(x, weights.norm_weight, weights.norm_bias, eps)
        normed_rows = normed[rows]
        asking = torch.addmm(row_bias, normed_rows, row_weight)
        columns = torch.addmm(column_bias, normed, column_weight)
        (u, q), (v, k) = _halves(asking, hidden), _halves(columns, hidden)
        attended = asking.new_empty(len(rows), hidden)
        _scale(k, v, spec)
        _attend(num_heads, q, k, v, attended, spec)
        gated, gate_moments = gate_forward(
            attended, u, weights.output_norm_weight, weights.output_norm_bias, eps
        )
        ctx.save_for_backward(
            x, rows, normed, moments, normed_rows, asking, columns, attended, gated, gate_moments,
            row_weight, column_weight, *parameters,
        )  # fmt: skip
        ctx.spec, ctx.num_heads = spec, num_heads
        return torch.addmm(x[rows], gated, weights.output_weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, rows, normed, moments, normed_rows, asking, columns, attended, gated, gate_moments,
         row_weight, column_weight, *parameters) = ctx.saved_tensors  # fmt: skip
        weights = LayerWeights(*parameters)
        hidden = weights.output_norm_weight.numel()
        grad = grad.contiguous()
        d_asking = torch.empty_like(asking)
        d_columns = torch.empty_like(columns)
        zero_spare_rows(d_columns, ctx.spec)
        (u, q), (v, k) = _halves(asking, hidden), _halves(columns, hidden)
        (du, dq), (dv, dk) = _halves(d_asking, hidden), _halves(d_columns, hidden)
        d_attended, d_gate_weight, d_gate_bias = gate_backward(
            grad @ weights.output_weight.t(), attended, u, weights.output_norm_weight,
            weights.output_norm_bias, gate_moments, du,
        )  # fmt: skip
        _attend_backward(ctx.num_heads, d_attended, q, k, v, dq, dk, dv, ctx.spec)
        d_normed = d_columns @ column_weight.t()
        d_normed.index_add_(0, rows, d_asking @ row_weight.t())
        dx, d_norm_weight, d_norm_bias = norm_backward(
            d_normed, None, x, weights.norm_weight, moments
        )
        dx.index_add_(0, rows, grad)
        d_weight = _by_projection(normed_rows.t() @ d_asking, normed.t() @ d_columns, hidden)
        d_bias = _by_projection(d_asking.sum(0), d_columns.sum(0), hidden)
        return (
            dx, None, None, None, None, d_norm_weight, d_norm_bias, d_weight, d_bias,
            d_gate_weight, d_gate_bias, gated.t() @ grad,
        )  # fmt: skip


class _Read(torch.autograd.Function):
    """Candidates that read a history of keys and values, and themselves: `[C, 3 H dv]`."""

    @staticmethod
    def forward(
        ctx: Any,
        asking: Tensor,
        columns: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        reading: AttentionSpec,
        num_heads: int,
        eps: float,
    ) -> Tensor:
        hidden = norm_weight.numel()
        v, k = _halves(columns, hidden)
        gated, attended, moments = _read_forward(
            asking, k, v, norm_weight, norm_bias, reading, num_heads, eps
        )
        ctx.save_for_backward(asking, columns, norm_weight, norm_bias, attended, moments)
        ctx.reading, ctx.num_heads = reading, num_heads
        return gated

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        asking, columns, norm_weight, norm_bias, attended, moments = ctx.saved_tensors
        hidden = norm_weight.numel()
        v, k = _halves(columns, hidden)
        d_columns = torch.empty_like(columns)
        zero_spare_rows(d_columns, ctx.reading)
        dv, dk = _halves(d_columns, hidden)
        d_asking, d_weight, d_bias = _read_backward(
            grad, asking, k, v, dk, dv, norm_weight, norm_bias, attended, moments,
            ctx.reading, ctx.num_heads, accumulate=False,
        )  # fmt: skip
        return d_asking, d_columns, d_weight, d_bias, None, None, None


class _AttendAndRead(torch.autograd.Function):
    """`_AttendAndGate` of the history and `_Read` of its candidates, one gradient for both."""

    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        asking: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        spec: AttentionSpec,
        reading: AttentionSpec,
        num_heads: int,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        hidden = norm_weight.numel()
        u, v, q, k = _split(projected, hidden)
        attended = projected.new_empty(len(projected), hidden)
        zero_spare_rows(attended, spec)
        _scale(k, v, spec)
        _attend(num_heads, q, k, v, attended, spec)
        gated, moments = gate_forward(attended, u, norm_weight, norm_bias, eps)
        read, read_attended, read_moments = _read_forward(
            asking, k, v, norm_weight, norm_bias, reading, num_heads, eps
        )
        ctx.save_for_backward(
            projected, asking, norm_weight, norm_bias, attended, moments, read_attended,
            read_moments,
        )  # fmt: skip
        ctx.spec, ctx.reading, ctx.num_heads = spec, reading, num_heads
        return gated, read

    @staticmethod
    def backward(ctx: Any, grad: Tensor, read_grad: Tensor) -> tuple[Tensor | None, ...]:
        (projected, asking, norm_weight, norm_bias, attended, moments, read_attended,
         read_moments) = ctx.saved_tensors  # fmt: skip
        hidden = norm_weight.numel()
        d_projected = torch.empty_like(projected)
        zero_spare_rows(d_projected, ctx.spec)
        u, v, q, k = _split(projected, hidden)
        du, dv, dq, dk = _split(d_projected, hidden)
        d_attended, d_weight, d_bias = gate_backward(
            grad.contiguous(), attended, u, norm_weight, norm_bias, moments, du
        )
        _attend_backward(ctx.num_heads, d_attended, q, k, v, dq, dk, dv, ctx.spec)
        d_asking, read_d_weight, read_d_bias = _read_backward(
            read_grad, asking, k, v, dk, dv, norm_weight, norm_bias, read_attended, read_moments,
            ctx.reading, ctx.num_heads, accumulate=True,
        )  # fmt: skip
        return (
            d_projected, d_asking, d_weight + read_d_weight, d_bias + read_d_bias,
            None, None, None, None,
        )  # fmt: skip


def _read_forward(
    asking: Tensor,
    k: Tensor,
    v: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    reading: AttentionSpec,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gated output, what was attended to, and its moments, of candidates `[C, ...]`."""
    hidden = norm_weight.numel()
    u, own_v, q, own_k = _split(asking, hidden)
    attended = asking.new_empty(len(asking), hidden)
    zero_spare_rows(attended, reading, of_queries=True)
    _attend(num_heads, q, k, v, attended, reading)
    q, own_k, own_v = (x.float() for x in _heads(num_heads, q, own_k, own_v))
    own = F.silu((q * own_k).sum(-1, keepdim=True) * reading.alpha) / reading.norm_length
    attended = (_heads(num_heads, attended)[0].float() + own * own_v).flatten(1).to(asking.dtype)
    gated, moments = gate_forward(attended, u, norm_weight, norm_bias, eps)
    return gated, attended, moments


def _read_backward(
    grad: Tensor,
    asking: Tensor,
    k: Tensor,
    v: Tensor,
    dk: Tensor,
    dv: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    attended: Tensor,
    moments: Tensor,
    reading: AttentionSpec,
    num_heads: int,
    *,
    accumulate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the candidates' projections and of the norm; dk and dv are written."""
    hidden = norm_weight.numel()
    d_asking = torch.empty_like(asking)
    zero_spare_rows(d_asking, reading, of_queries=True)
    u, own_v, q, own_k = _split(asking, hidden)
    du, d_own_v, dq, d_own_k = _split(d_asking, hidden)
    d_attended, d_weight, d_bias = gate_backward(
        grad.contiguous(), attended, u, norm_weight, norm_bias, moments, du
    )
    _attend_backward(num_heads, d_attended, q, k, v, dq, dk, dv, reading, accumulate)
    q, own_k, own_v, d_attended = (
        x.float() for x in _heads(num_heads, q, own_k, own_v, d_attended)
    )
    score = (q * own_k).sum(-1, keepdim=True) * reading.alpha
    sigmoid = torch.sigmoid(score)
    own = score * sigmoid / reading.norm_length
    slope = sigmoid * (1.0 + score * (1.0 - sigmoid)) * (reading.alpha / reading.norm_length)
    d_score = (d_attended * own_v).sum(-1, keepdim=True) * slope
    d_own_v.copy_((d_attended * own).flatten(1))
    d_own_k.copy_((d_score * q).flatten(1))
    dq.add_((d_score * own_k).flatten(1).to(dq.dtype))
    return d_asking, d_weight, d_bias


def _scale(k: Tensor, v: Tensor, spec: AttentionSpec) -> None:
    """Apply the column weights to fresh projections, which nobody else has seen unscaled."""
    if spec.column_weights is not None:
        scaled = k if spec.mask_position == "pre" else v
        scale_rows(scaled, spec.column_weights, scaled)


def _attend(
    num_heads: int, q: Tensor, k: Tensor, v: Tensor, attended: Tensor, spec: AttentionSpec
) -> None:
    q, k, v, attended = _heads(num_heads, q, k, v, attended)
    attention_forward(q, k, v, attended, spec)


def _attend_backward(
    num_heads: int,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    spec: AttentionSpec,
    accumulate: bool = False,
) -> None:
    grad, q, k, v, dq, dk, dv = _heads(num_heads, grad, q, k, v, dq, dk, dv)
    attention_backward(grad, q, k, v, dq, dk, dv, spec, accumulate=accumulate)


def _split(projected: Tensor, hidden: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, v, q, k of projections, of their weight or of their bias."""
    attention = projected.shape[-1] // 2 - hidden
    u, v, q, k = projected.split([hidden, hidden, attention, attention], dim=-1)
    return u, v, q, k


def _halves(projected: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    """u and q, or v and k, where they were projected by themselves."""
    return projected[:, :hidden], projected[:, hidden:]


def _by_use(parameter: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    """What makes u and q (of the rows that ask), and v and k (of the columns)."""
    u, v, q, k = _split(parameter, hidden)
    return torch.cat([u, q], -1), torch.cat([v, k], -1)


def _by_projection(of_rows: Tensor, of_columns: Tensor, hidden: int) -> Tensor:
    """The inverse of `_by_use`."""
    parts = (of_rows[..., :hidden], of_columns[..., :hidden], of_rows[..., hidden:],
             of_columns[..., hidden:])  # fmt: skip
    return torch.cat(parts, -1)


def _heads(num_heads: int, *tensors: Tensor) -> list[Tensor]:
    return [x.view(len(x), num_heads, -1) for x in tensors]
