"""The kernel of `triton.py`: one program per candidate and head."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def slot_attention_kernel(Q, K, V, Keys, Values, Near, Index, Weights, Table, NearPlaces,
                          SlotPlaces, Out, q_stride, k_stride, v_stride, near_stride, num_near,
                          num_slots, num_rows, own_place, alpha, scale, HEADS: tl.constexpr,
                          SIZE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
                          BIASED: tl.constexpr, PRE: tl.constexpr):  # fmt: skip
    candidate = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, WIDE)
    held = dims < SIZE
    at = head * SIZE + dims
    q = tl.load(Q + candidate * q_stride + at, mask=held, other=0.0).to(tl.float32) * alpha
    k = tl.load(K + candidate * k_stride + at, mask=held, other=0.0).to(tl.float32)
    v = tl.load(V + candidate * v_stride + at, mask=held, other=0.0).to(tl.float32)
    score = tl.sum(q * k)
    if BIASED:
        score += tl.load(Table + own_place).to(tl.float32)
    total = _silu(score) * scale * v
    first_row = head.to(tl.int64) * num_rows
    for first in range(0, num_near, ROWS):
        place = first + tl.arange(0, ROWS)
        there = place < num_near
        rows = first_row + tl.load(Near + place, mask=there, other=0)
        tile = rows[:, None] * SIZE + dims[None, :]
        inside = there[:, None] & held[None, :]
        scores = tl.sum(tl.load(Keys + tile, mask=inside, other=0.0).to(tl.float32) * q, axis=1)
        if BIASED:
            bucket = tl.load(NearPlaces + candidate * near_stride + place, mask=there, other=0)
            scores += tl.load(Table + bucket, mask=there, other=0.0).to(tl.float32)
        share = tl.where(there, _silu(scores) * scale, 0.0)
        values = tl.load(Values + tile, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(share[:, None] * values, axis=0)
    for first in range(0, num_slots, ROWS):
        place = first + tl.arange(0, ROWS)
        slot = candidate * num_slots + place
        weight = tl.load(Weights + slot, mask=place < num_slots, other=0.0).to(tl.float32)
        there = weight > 0.0
        rows = first_row + tl.load(Index + slot, mask=there, other=0)
        tile = rows[:, None] * SIZE + dims[None, :]
        inside = there[:, None] & held[None, :]
        scores = tl.sum(tl.load(Keys + tile, mask=inside, other=0.0).to(tl.float32) * q, axis=1)
        if BIASED:
            bucket = tl.load(SlotPlaces + slot, mask=there, other=0)
            scores += tl.load(Table + bucket, mask=there, other=0.0).to(tl.float32)
        share = _silu(scores * weight) * scale if PRE else _silu(scores) * weight * scale
        values = tl.load(Values + tile, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(share[:, None] * values, axis=0)
    out = Out + candidate * (HEADS * SIZE) + at
    tl.store(out, total.to(Out.dtype.element_ty), mask=held)
