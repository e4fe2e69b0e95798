"""Row by row work of an HSTU layer in one pass each: layer norm, and the gated output."""

# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 528  # of a backward: four on each of 132 multiprocessors, one partial sum each
_TILE = 4096  # numbers a program holds of each operand, forward; half of it backward


def norm_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Layer norm of `[T, D]`; also mean and 1 / deviation, `[T, 2]` float32."""
    normed = torch.empty_like(x)
    moments = torch.empty(x.shape[0], 2, dtype=torch.float32, device=x.device)
    wide, rows = _tile(x.shape[1])
    if x.shape[0]:
        _norm_forward_kernel[(triton.cdiv(x.shape[0], rows),)](
            x, weight, bias, normed, moments, x.shape[0], eps,
            SIZE=x.shape[1], WIDE=wide, ROWS=rows, num_warps=4,
        )  # fmt: skip
    return normed, moments


def norm_backward(
    grad: Tensor, residual: Tensor | None, x: Tensor, weight: Tensor, moments: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (with that of the residual stream added), weight and bias."""
    dx = torch.empty_like(x)
    wide, rows = _tile(x.shape[1], _TILE // 2)
    programs = max(1, min(_PROGRAMS, triton.cdiv(x.shape[0], rows)))
    partial = torch.empty(2, programs, x.shape[1], dtype=torch.float32, device=x.device)
    _norm_backward_kernel[(programs,)](
        grad, x if residual is None else residual, x, weight, moments, dx, partial, x.shape[0],
        RESIDUAL=residual is not None, SIZE=x.shape[1], WIDE=wide, ROWS=rows, num_warps=4,
    )  # fmt: skip
    sums = partial.sum(1).to(weight.dtype)
    return dx, sums[0], sums[1]


def gate_forward(
    attention: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`[SiLU(u), a, SiLU(u) * norm(a)]`, `[T, 3 D]`, of attention a and gate u `[T, D]`.

    The gate may be a slice of a wider tensor. Also the moments of a, as in `norm_forward`.
    """
    total, size = attention.shape
    output = attention.new_empty(total, 3 * size)
    moments = torch.empty(total, 2, dtype=torch.float32, device=attention.device)
    wide, rows = _tile(size)
    if total:
        _gate_forward_kernel[(triton.cdiv(total, rows),)](
            attention, gate, weight, bias, output, moments, total, gate.stride(0), eps,
            SIZE=size, WIDE=wide, ROWS=rows, num_warps=4,
        )  # fmt: skip
    return output, moments


def gate_backward(
    grad: Tensor,
    attention: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    moments: Tensor,
    d_gate: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention, weight and bias; that of the gate is written to `d_gate`."""
    total, size = attention.shape
    d_attention = torch.empty_like(attention)
    wide, rows = _tile(size, _TILE // 2)
    programs = max(1, min(_PROGRAMS, triton.cdiv(total, rows)))
    partial = torch.empty(2, programs, size, dtype=torch.float32, device=attention.device)
    _gate_backward_kernel[(programs,)](
        grad, attention, gate, weight, bias, moments, d_attention, d_gate, partial,
        total, gate.stride(0), d_gate.stride(0),
        SIZE=size, WIDE=wide, ROWS=rows, num_warps=4,
    )  # fmt: skip
    sums = partial.sum(1).to(weight.dtype)
    return d_attention, sums[0], sums[1]


def scale_rows(x: Tensor, weights: Tensor, out: Tensor) -> None:
    """Write every row of `[T, D]` times its weight `[T]`; x, which may be out, may be a slice."""
    wide, rows = _tile(x.shape[1])
    if len(x):
        _scale_rows_kernel[(triton.cdiv(len(x), rows),)](
            x, weights, out, len(x), x.stride(0), out.stride(0),
            SIZE=x.shape[1], WIDE=wide, ROWS=rows, num_warps=4,
        )  # fmt: skip


class Norm(torch.autograd.Function):
    """Layer norm that hands its input on as the residual, so both gradients meet in one pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        normed, moments = norm_forward(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, moments)
        return normed, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, moments = ctx.saved_tensors
        dx, d_weight, d_bias = norm_backward(
            grad.contiguous(), residual.contiguous(), x, weight, moments
        )
        return dx, d_weight, d_bias, None


def _tile(size: int, numbers: int = _TILE) -> tuple[int, int]:
    wide = triton.next_power_of_2(size)
    return wide, max(1, numbers // wide)


@triton.jit
def _scale_rows_kernel(X, Weights, Out, total, stride_x, stride_o, SIZE: tl.constexpr,
                       WIDE: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    places = tl.arange(0, WIDE)
    inside = (rows < total)[:, None] & (places < SIZE)[None, :]
    weights = tl.load(Weights + rows, mask=rows < total, other=0.0)
    x = tl.load(X + rows[:, None] * stride_x + places[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32) * weights[:, None]
    out = Out + rows[:, None] * stride_o + places[None, :]
    tl.store(out, x.to(Out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_forward_kernel(X, Weight, Bias, Normed, Moments, total, eps,
                         SIZE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    places = tl.arange(0, WIDE)
    held = places < SIZE
    inside = (rows < total)[:, None] & held[None, :]
    where = rows[:, None] * SIZE + places[None, :]
    x = tl.load(X + where, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / SIZE
    centred = tl.where(held[None, :], x - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / SIZE + eps)
    weight = tl.load(Weight + places, mask=held, other=0.0).to(tl.float32)
    bias = tl.load(Bias + places, mask=held, other=0.0).to(tl.float32)
    normed = centred * scale[:, None] * weight[None, :] + bias[None, :]
    tl.store(Normed + where, normed.to(Normed.dtype.element_ty), mask=inside)
    tl.store(Moments + rows * 2, mean, mask=rows < total)
    tl.store(Moments + rows * 2 + 1, scale, mask=rows < total)


@triton.jit
def _norm_slope(grad, unit, scale, held, SIZE: tl.constexpr):
    """Gradient through layer norm: `grad` by the normed value times weight, `unit` normed."""
    mean_grad = tl.sum(grad, axis=1) / SIZE
    mean_product = tl.sum(grad * unit, axis=1) / SIZE
    slope = (grad - mean_grad[:, None] - unit * mean_product[:, None]) * scale[:, None]
    return tl.where(held[None, :], slope, 0.0)


@triton.jit
def _norm_backward_kernel(Grad, Residual, X, Weight, Moments, DX, Partial, total,
                          RESIDUAL: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
                          ROWS: tl.constexpr):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    places = tl.arange(0, WIDE)
    held = places < SIZE
    weight = tl.load(Weight + places, mask=held, other=0.0).to(tl.float32)
    # Summed over rows at the very end: in the loop, every sum would wait for all warps.
    d_weight = tl.zeros((ROWS, WIDE), dtype=tl.float32)
    d_bias = tl.zeros((ROWS, WIDE), dtype=tl.float32)
    for first in range(program * ROWS, total, programs * ROWS):
        rows = tl.full((), first, tl.int64) + tl.arange(0, ROWS)
        inside = (rows < total)[:, None] & held[None, :]
        where = rows[:, None] * SIZE + places[None, :]
        x = tl.load(X + where, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(Grad + where, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(Moments + rows * 2, mask=rows < total, other=0.0)
        scale = tl.load(Moments + rows * 2 + 1, mask=rows < total, other=0.0)
        unit = tl.where(inside, (x - mean[:, None]) * scale[:, None], 0.0)
        d_weight += grad * unit
        d_bias += grad
        dx = _norm_slope(grad * weight[None, :], unit, scale, held, SIZE)
        if RESIDUAL:
            dx += tl.load(Residual + where, mask=inside, other=0.0).to(tl.float32)
        tl.store(DX + where, dx.to(DX.dtype.element_ty), mask=inside)
    tl.store(Partial + program * SIZE + places, tl.sum(d_weight, axis=0), mask=held)
    tl.store(Partial + (programs + program) * SIZE + places, tl.sum(d_bias, axis=0), mask=held)


@triton.jit
def _gate_forward_kernel(Attention, Gate, Weight, Bias, Out, Moments, total, stride_g, eps,
                         SIZE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    places = tl.arange(0, WIDE)
    held = places < SIZE
    inside = (rows < total)[:, None] & held[None, :]
    raw = tl.load(Attention + rows[:, None] * SIZE + places[None, :], mask=inside, other=0.0)
    gate = tl.load(Gate + rows[:, None] * stride_g + places[None, :], mask=inside, other=0.0)
    gate = gate.to(tl.float32)
    gate = gate * tl.sigmoid(gate)
    a = raw.to(tl.float32)
    mean = tl.sum(a, axis=1) / SIZE
    centred = tl.where(held[None, :], a - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / SIZE + eps)
    weight = tl.load(Weight + places, mask=held, other=0.0).to(tl.float32)
    bias = tl.load(Bias + places, mask=held, other=0.0).to(tl.float32)
    normed = centred * scale[:, None] * weight[None, :] + bias[None, :]
    out = Out + rows[:, None] * (3 * SIZE) + places[None, :]
    kind = Out.dtype.element_ty
    tl.store(out, gate.to(kind), mask=inside)
    tl.store(out + SIZE, raw, mask=inside)
    tl.store(out + 2 * SIZE, (gate * normed).to(kind), mask=inside)
    tl.store(Moments + rows * 2, mean, mask=rows < total)
    tl.store(Moments + rows * 2 + 1, scale, mask=rows < total)


@triton.jit
def _gate_backward_kernel(Grad, Attention, Gate, Weight, Bias, Moments, DAttention, DGate,
                          Partial, total, stride_g, stride_d,
                          SIZE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    places = tl.arange(0, WIDE)
    held = places < SIZE
    weight = tl.load(Weight + places, mask=held, other=0.0).to(tl.float32)
    bias = tl.load(Bias + places, mask=held, other=0.0).to(tl.float32)
    # Summed over rows at the very end: in the loop, every sum would wait for all warps.
    d_weight = tl.zeros((ROWS, WIDE), dtype=tl.float32)
    d_bias = tl.zeros((ROWS, WIDE), dtype=tl.float32)
    for first in range(program * ROWS, total, programs * ROWS):
        rows = tl.full((), first, tl.int64) + tl.arange(0, ROWS)
        inside = (rows < total)[:, None] & held[None, :]
        where = rows[:, None] * SIZE + places[None, :]
        a = tl.load(Attention + where, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(Gate + rows[:, None] * stride_g + places[None, :], mask=inside, other=0.0)
        gate = gate.to(tl.float32)
        grad = Grad + rows[:, None] * (3 * SIZE) + places[None, :]
        d_plain_gate = tl.load(grad, mask=inside, other=0.0).to(tl.float32)
        d_plain = tl.load(grad + SIZE, mask=inside, other=0.0).to(tl.float32)
        d_product = tl.load(grad + 2 * SIZE, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(Moments + rows * 2, mask=rows < total, other=0.0)
        scale = tl.load(Moments + rows * 2 + 1, mask=rows < total, other=0.0)
        unit = tl.where(inside, (a - mean[:, None]) * scale[:, None], 0.0)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        d_silu = d_plain_gate + d_product * (unit * weight[None, :] + bias[None, :])
        d_normed = d_product * silu
        d_weight += d_normed * unit
        d_bias += d_normed
        da = d_plain + _norm_slope(d_normed * weight[None, :], unit, scale, held, SIZE)
        dg = d_silu * (sigmoid + silu * (1.0 - sigmoid))
        tl.store(DAttention + where, da.to(DAttention.dtype.element_ty), mask=inside)
        tl.store(DGate + rows[:, None] * stride_d + places[None, :],
                 dg.to(DGate.dtype.element_ty), mask=inside)  # fmt: skip
    tl.store(Partial + program * SIZE + places, tl.sum(d_weight, axis=0), mask=held)
    tl.store(Partial + (programs + program) * SIZE + places, tl.sum(d_bias, axis=0), mask=held)
