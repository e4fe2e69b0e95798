"""Row by row work of an HSTU layer in one pass each: layer norm, and the gated output."""

from typing import Any

import torch
import triton
from torch import Tensor

from hpgr_plugin.ops.hstu_layer.kernels import (
    gate_backward_kernel,
    gate_forward_kernel,
    norm_backward_kernel,
    norm_forward_kernel,
    own_backward_kernel,
    own_forward_kernel,
    scale_rows_kernel,
)
from hpgr_plugin.ops.hstu_layer.layer import Dropout

_PROGRAMS = 528  # of a backward: four on each of 132 multiprocessors, one partial sum each
_TILE = 4096  # numbers a program holds of each operand, forward; half of it backward


def norm_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Layer norm of `[T, D]`; also mean and 1 / deviation, `[T, 2]` float32."""
    normed = torch.empty_like(x)
    moments, programs, constants = _forward(x)
    if len(x):
        norm_forward_kernel[programs](x, weight, bias, normed, moments, len(x), eps, **constants)
    return normed, moments


def norm_backward(
    grad: Tensor, residual: Tensor | None, x: Tensor, weight: Tensor, moments: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (with that of the residual stream added), weight and bias."""
    dx = torch.empty_like(x)
    partial, programs, constants = _backward(x)
    norm_backward_kernel[programs](
        grad, x if residual is None else residual, x, weight, moments, dx, partial, len(x),
        RESIDUAL=residual is not None, **constants,
    )  # fmt: skip
    return dx, *_in_dtype(partial.sum(1), weight)


def gate_forward(
    attention: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor]:
    """`[SiLU(u), a, SiLU(u) * norm(a)]`, `[T, 3 D]`, of attention a and gate u `[T, D]`.

    The gate may be a slice of a wider tensor. Also the moments of a, as in `norm_forward`.
    """
    total, size = attention.shape
    output = attention.new_empty(total, 3 * size)
    moments, programs, constants = _forward(attention)
    if total:
        gate_forward_kernel[programs](
            attention, gate, weight, bias, output, moments, _seed(dropout, attention), total,
            gate.stride(0), eps, **_dropped(dropout), **constants,
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
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention, weight and bias; that of the gate is written to `d_gate`."""
    d_attention = torch.empty_like(attention)
    partial, programs, constants = _backward(attention)
    gate_backward_kernel[programs](
        grad, attention, gate, weight, bias, moments, d_attention, d_gate, partial,
        _seed(dropout, attention), len(attention), gate.stride(0), d_gate.stride(0),
        **_dropped(dropout), **constants,
    )  # fmt: skip
    return d_attention, *_in_dtype(partial.sum(1), weight)


def scale_rows(x: Tensor, weights: Tensor, out: Tensor) -> None:
    """Write every row of `[T, D]` times its weight `[T]`; x, which may be out, may be a slice."""
    programs, constants = _grid(x, _TILE)
    if len(x):
        scale_rows_kernel[programs](
            x, weights, out, len(x), x.stride(0), out.stride(0), **constants
        )


def own_forward(
    q: Tensor, k: Tensor, v: Tensor, attended: Tensor, heads: int, alpha: float, norm: float
) -> None:
    """Add to `attended` `[C, H dv]` what every candidate reads of itself.

    Args:
        q, k, v: `[C, H d]` and `[C, H dv]`, slices of one tensor.
        attended: contiguous.
        heads: H.
        alpha: factor of `q . k`.
        norm: n of the `1 / n`.
    """
    if len(q):
        grid, constants = _own_grid(q, v, heads)
        own_forward_kernel[grid](
            q, k, v, attended, len(q), q.stride(0), attended.stride(0), alpha, 1.0 / norm,
            **constants,
        )  # fmt: skip


def own_backward(
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    slopes: tuple[Tensor, Tensor, Tensor],
    heads: int,
    alpha: float,
    norm: float,
) -> None:
    """The gradients of `own_forward`: dq is added to, dk and dv are written.

    Args:
        grad: of `attended`, contiguous.
        inputs: q, k and v.
        slopes: dq, dk and dv, slices of one tensor.
        heads, alpha, norm: as in the forward.
    """
    q, _, v = inputs
    if len(q):
        grid, constants = _own_grid(q, v, heads)
        own_backward_kernel[grid](
            grad, *inputs, *slopes, len(q), q.stride(0), grad.stride(0), slopes[0].stride(0),
            alpha, 1.0 / norm, **constants,
        )  # fmt: skip


def _own_grid(q: Tensor, v: Tensor, heads: int) -> tuple[tuple[int, int], dict[str, int]]:
    constants = {"D": q.shape[1] // heads, "DV": v.shape[1] // heads, "ROWS": 16, "num_warps": 4}
    return (triton.cdiv(len(q), constants["ROWS"]), heads), constants


def _seed(dropout: Dropout | None, absent: Tensor) -> Tensor:
    """What a kernel gets as its seed; without dropout it is never read, so any tensor will do."""
    return absent if dropout is None else dropout.seed


def _dropped(dropout: Dropout | None) -> dict[str, Any]:
    draw, rate = (0, 0.0) if dropout is None else (dropout.draw, dropout.rate)
    return {"draw": draw, "rate": rate, "DROPOUT": dropout is not None}


def _in_dtype(sums: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    d_weight, d_bias = sums.to(weight.dtype)
    return d_weight, d_bias


def _grid(x: Tensor, numbers: int) -> tuple[tuple[int], dict[str, int]]:
    """Programs that cover the rows of `[T, D]`, and the constants of their tiles."""
    wide = triton.next_power_of_2(x.shape[1])
    rows = max(1, numbers // wide)
    constants = {"SIZE": x.shape[1], "WIDE": wide, "ROWS": rows, "num_warps": 4}
    return (triton.cdiv(len(x), rows),), constants


def _forward(x: Tensor) -> tuple[Tensor, tuple[int], dict[str, int]]:
    """Moments `[T, 2]` to write, programs and constants."""
    moments = torch.empty(len(x), 2, dtype=torch.float32, device=x.device)
    return moments, *_grid(x, _TILE)


def _backward(x: Tensor) -> tuple[Tensor, tuple[int], dict[str, int]]:
    """Partial sums of two gradients to write, `[2, programs, D]`, programs and constants."""
    (needed,), constants = _grid(x, _TILE // 2)
    programs = max(1, min(_PROGRAMS, needed))
    partial = torch.empty(2, programs, x.shape[1], dtype=torch.float32, device=x.device)
    return partial, (programs,), constants
