"""The kernels of `rowwise.py`: a program owns a tile of rows."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _tile(first, total, SIZE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):
    """Rows from `first` on, places in a row, which places and which numbers are there."""
    rows = first + tl.arange(0, ROWS)
    places = tl.arange(0, WIDE)
    held = places < SIZE
    return rows, places, held, (rows < total)[:, None] & held[None, :]


@triton.jit
def _own_tile(total, SIZE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):
    """The tile of this program, where each program has one."""
    return _tile(tl.program_id(0).to(tl.int64) * ROWS, total, SIZE, WIDE, ROWS)


@triton.jit
def _norm(x, Weight, Bias, Moments, rows, places, held, total, eps, SIZE: tl.constexpr):
    """Layer norm of a tile; stores mean and 1 / deviation."""
    mean = tl.sum(x, axis=1) / SIZE
    centred = tl.where(held[None, :], x - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / SIZE + eps)
    weight = _parameter(Weight, places, held)
    bias = _parameter(Bias, places, held)
    tl.store(Moments + rows * 2, mean, mask=rows < total)
    tl.store(Moments + rows * 2 + 1, scale, mask=rows < total)
    return centred * scale[:, None] * weight[None, :] + bias[None, :]


@triton.jit
def _parameter(Parameter, places, held):
    """A row of weights or biases, in float32."""
    return tl.load(Parameter + places, mask=held, other=0.0).to(tl.float32)


@triton.jit
def _unit(x, Moments, rows, inside, total):
    """The normed tile before weight and bias, and its scale, from the stored moments."""
    mean = tl.load(Moments + rows * 2, mask=rows < total, other=0.0)
    scale = tl.load(Moments + rows * 2 + 1, mask=rows < total, other=0.0)
    return tl.where(inside, (x - mean[:, None]) * scale[:, None], 0.0), scale


@triton.jit
def _norm_slope(grad, unit, scale, held, SIZE: tl.constexpr):
    """Gradient through layer norm: `grad` by the normed value times weight, `unit` normed."""
    mean_grad = tl.sum(grad, axis=1) / SIZE
    mean_product = tl.sum(grad * unit, axis=1) / SIZE
    slope = (grad - mean_grad[:, None] - unit * mean_product[:, None]) * scale[:, None]
    return tl.where(held[None, :], slope, 0.0)


@triton.jit
def _zero_sums(ROWS: tl.constexpr, WIDE: tl.constexpr):
    """The gradients of weight and bias before the first tile, a row for each row of a tile.

    They are summed over rows at the very end: in the loop, every sum would wait for all warps.
    """
    zeros = tl.zeros((ROWS, WIDE), dtype=tl.float32)
    return zeros, zeros


@triton.jit
def _store_partial(Partial, d_weight, d_bias, places, held, SIZE: tl.constexpr):
    """Store this program's share of two gradients."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(Partial + program * SIZE + places, tl.sum(d_weight, axis=0), mask=held)
    tl.store(Partial + (programs + program) * SIZE + places, tl.sum(d_bias, axis=0), mask=held)


@triton.jit
def scale_rows_kernel(X, Weights, Out, total, stride_x, stride_o, SIZE: tl.constexpr,
                      WIDE: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    rows, places, _, inside = _own_tile(total, SIZE, WIDE, ROWS)
    weights = tl.load(Weights + rows, mask=rows < total, other=0.0)
    x = tl.load(X + rows[:, None] * stride_x + places[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32) * weights[:, None]
    out = Out + rows[:, None] * stride_o + places[None, :]
    tl.store(out, x.to(Out.dtype.element_ty), mask=inside)


@triton.jit
def norm_forward_kernel(X, Weight, Bias, Normed, Moments, total, eps,
                        SIZE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    rows, places, held, inside = _own_tile(total, SIZE, WIDE, ROWS)
    where = rows[:, None] * SIZE + places[None, :]
    x = tl.load(X + where, mask=inside, other=0.0).to(tl.float32)
    normed = _norm(x, Weight, Bias, Moments, rows, places, held, total, eps, SIZE)
    tl.store(Normed + where, normed.to(Normed.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_kernel(Grad, Residual, X, Weight, Moments, DX, Partial, total,
                         RESIDUAL: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
                         ROWS: tl.constexpr):  # fmt: skip
    places = tl.arange(0, WIDE)
    weight = _parameter(Weight, places, places < SIZE)
    d_weight, d_bias = _zero_sums(ROWS, WIDE)
    for first in range(tl.program_id(0) * ROWS, total, tl.num_programs(0) * ROWS):
        rows, _, held, inside = _tile(tl.full((), first, tl.int64), total, SIZE, WIDE, ROWS)
        where = rows[:, None] * SIZE + places[None, :]
        x = tl.load(X + where, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(Grad + where, mask=inside, other=0.0).to(tl.float32)
        unit, scale = _unit(x, Moments, rows, inside, total)
        d_weight += grad * unit
        d_bias += grad
        dx = _norm_slope(grad * weight[None, :], unit, scale, held, SIZE)
        if RESIDUAL:
            dx += tl.load(Residual + where, mask=inside, other=0.0).to(tl.float32)
        tl.store(DX + where, dx.to(DX.dtype.element_ty), mask=inside)
    _store_partial(Partial, d_weight, d_bias, places, places < SIZE, SIZE)


@triton.jit
def _kept(Seed, draw, where, rate):
    """Factors of three numbers at each place: 0 where dropped, else 1 / (1 - rate)."""
    # Seven rounds of Philox pass the usual tests of randomness; the default of ten costs more.
    first, second, third, _ = tl.rand4x(tl.load(Seed) + draw, where, 7)
    scale = 1.0 / (1.0 - rate)
    return (
        tl.where(first > rate, scale, 0.0),
        tl.where(second > rate, scale, 0.0),
        tl.where(third > rate, scale, 0.0),
    )


@triton.jit
def gate_forward_kernel(Attention, Gate, Weight, Bias, Out, Moments, Seed, total, stride_g, eps,
                        draw, rate, DROPOUT: tl.constexpr, SIZE: tl.constexpr,
                        WIDE: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    rows, places, held, inside = _own_tile(total, SIZE, WIDE, ROWS)
    where = rows[:, None] * SIZE + places[None, :]
    raw = tl.load(Attention + where, mask=inside, other=0.0)
    gate = tl.load(Gate + rows[:, None] * stride_g + places[None, :], mask=inside, other=0.0)
    gate = gate.to(tl.float32)
    gate = gate * tl.sigmoid(gate)
    a = raw.to(tl.float32)
    normed = _norm(a, Weight, Bias, Moments, rows, places, held, total, eps, SIZE)
    out = Out + rows[:, None] * (3 * SIZE) + places[None, :]
    kind = Out.dtype.element_ty
    product = gate * normed
    if DROPOUT:
        keep_gate, keep_raw, keep_product = _kept(Seed, draw, where, rate)
        gate *= keep_gate
        a *= keep_raw
        product *= keep_product
    tl.store(out, gate.to(kind), mask=inside)
    tl.store(out + SIZE, a.to(kind), mask=inside)
    tl.store(out + 2 * SIZE, product.to(kind), mask=inside)


@triton.jit
def gate_backward_kernel(Grad, Attention, Gate, Weight, Bias, Moments, DAttention, DGate,
                         Partial, Seed, total, stride_g, stride_d, draw, rate,
                         DROPOUT: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
                         ROWS: tl.constexpr):  # fmt: skip
    places = tl.arange(0, WIDE)
    d_weight, d_bias = _zero_sums(ROWS, WIDE)
    weight = _parameter(Weight, places, places < SIZE)
    bias = _parameter(Bias, places, places < SIZE)
    for first in range(tl.program_id(0) * ROWS, total, tl.num_programs(0) * ROWS):
        rows, _, held, inside = _tile(tl.full((), first, tl.int64), total, SIZE, WIDE, ROWS)
        where = rows[:, None] * SIZE + places[None, :]
        a = tl.load(Attention + where, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(Gate + rows[:, None] * stride_g + places[None, :], mask=inside, other=0.0)
        gate = gate.to(tl.float32)
        grad = Grad + rows[:, None] * (3 * SIZE) + places[None, :]
        d_plain_gate = tl.load(grad, mask=inside, other=0.0).to(tl.float32)
        d_plain = tl.load(grad + SIZE, mask=inside, other=0.0).to(tl.float32)
        d_product = tl.load(grad + 2 * SIZE, mask=inside, other=0.0).to(tl.float32)
        if DROPOUT:
            keep_gate, keep_raw, keep_product = _kept(Seed, draw, where, rate)
            d_plain_gate *= keep_gate
            d_plain *= keep_raw
            d_product *= keep_product
        unit, scale = _unit(a, Moments, rows, inside, total)
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
    _store_partial(Partial, d_weight, d_bias, places, places < SIZE, SIZE)


@triton.jit
def _own(Q, K, V, rows, total, stride, alpha, D: tl.constexpr, DV: tl.constexpr):
    """q, k and v of a tile of candidates, their scores with themselves, and which are there."""
    inside = (rows < total)[:, None]
    at_k = rows[:, None] * stride + tl.arange(0, D)[None, :]
    at_v = rows[:, None] * stride + tl.arange(0, DV)[None, :]
    q = tl.load(Q + at_k, mask=inside, other=0.0).to(tl.float32)
    k = tl.load(K + at_k, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(V + at_v, mask=inside, other=0.0).to(tl.float32)
    return q, k, v, tl.sum(q * k, axis=1) * alpha, inside


@triton.jit
def own_forward_kernel(Q, K, V, Attended, total, stride, stride_a, alpha, inverse_norm,
                       D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    _, _, v, score, inside = _own(
        Q + head * D, K + head * D, V + head * DV, rows, total, stride, alpha, D, DV
    )
    weight = score * tl.sigmoid(score) * inverse_norm
    where = Attended + rows[:, None] * stride_a + head * DV + tl.arange(0, DV)[None, :]
    attended = tl.load(where, mask=inside, other=0.0).to(tl.float32) + weight[:, None] * v
    tl.store(where, attended.to(Attended.dtype.element_ty), mask=inside)


@triton.jit
def own_backward_kernel(Grad, Q, K, V, DQ, DK, DV_, total, stride, stride_g, stride_d, alpha,
                        inverse_norm, D: tl.constexpr, DV: tl.constexpr,
                        ROWS: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    q, k, v, score, inside = _own(
        Q + head * D, K + head * D, V + head * DV, rows, total, stride, alpha, D, DV
    )
    at_v = head * DV + tl.arange(0, DV)[None, :]
    grad = tl.load(Grad + rows[:, None] * stride_g + at_v, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(score)
    slope = sigmoid * (1.0 + score * (1.0 - sigmoid))
    d_score = (tl.sum(grad * v, axis=1) * slope * (alpha * inverse_norm))[:, None]
    dv = grad * (score * sigmoid * inverse_norm)[:, None]
    to_k = rows[:, None] * stride_d + head * D + tl.arange(0, D)[None, :]
    dq = tl.load(DQ + to_k, mask=inside, other=0.0).to(tl.float32) + d_score * k
    tl.store(DQ + to_k, dq.to(DQ.dtype.element_ty), mask=inside)
    tl.store(DK + to_k, (d_score * q).to(DK.dtype.element_ty), mask=inside)
    tl.store(DV_ + rows[:, None] * stride_d + at_v, dv.to(DV_.dtype.element_ty), mask=inside)
