"""SEM's two passes over the tokens as kernels: sum up every session, and add its context back.

The [CLS] token of a one-layer intra encoder is the same for every session, so its query is too,
and a key's projection can be taken to the query: `q . (W_k y) = (W_k^T q) . y`. What is left for
the tokens is attention of H queries over layer-normed rows, keys and values alike; the value's
projection follows once a session. Nothing is added atomically: every run gives the same bits.
"""

# mypy: disable-error-code="no-untyped-def"

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpgr_plugin.ops.dispatch import dot_precision

LARGEST_EMBEDDING = 1024
LARGEST_EMBEDDING_FLOAT32 = 256  # of products in float32, which take more registers
LARGEST_HEADS = 16
_TOKENS = 16  # a tile, the least that a matrix unit takes
_PROGRAMS = 264  # of a backward: two on each of 132 multiprocessors, one partial sum each
_EPS = 1e-5  # of torch's layer norm
_KINDS = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}  # of products


class Spans(NamedTuple):
    """Where each of S segments lies in the flat tokens: `starts` and `lengths`, int64 `[S]`."""

    starts: Tensor
    lengths: Tensor


def why_not(tokens: Tensor, num_heads: int) -> str | None:
    """Why the kernels do not know the case, or None."""
    if tokens.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {tokens.dtype}"
    kind = _product_dtype(tokens)
    largest = LARGEST_EMBEDDING_FLOAT32 if kind == torch.float32 else LARGEST_EMBEDDING
    if tokens.shape[1] > largest:
        return f"embedding_dim {tokens.shape[1]}, more than {largest} in {kind}"
    if num_heads > LARGEST_HEADS:
        return f"{num_heads} heads, more than {LARGEST_HEADS}"
    return None


def pool_spans(
    tokens: Tensor,
    position: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    lead: Tensor,
    queries: Tensor,
    spans: Spans,
) -> Tensor:
    """Means of `lead` and `y_i = LayerNorm(tokens_i + position_i)`, weighted by a softmax.

    Head h of span s weights its y by the softmax of `queries_h . y`, the lead's among them.

    Args:
        tokens: `[T, D]` float32, bfloat16 or float16.
        position: `[P, D]`, by place in the span; no span is longer than P.
        norm_weight, norm_bias: `[D]`.
        lead: `[D]`, normed already.
        queries: `[H, D]`, scaled already.
        spans: no token lies in two of them.

    Returns:
        `[H, S, D]` in the dtype of the tokens.
    """
    pooled: Tensor = _PoolSpans.apply(
        tokens, position, norm_weight, norm_bias, lead, queries, spans
    )
    return pooled


def add_context(tokens: Tensor, context: Tensor, gate: Tensor, offsets: Tensor) -> Tensor:
    """`h + gate * rms(h) * context_s` for the tokens h of every segment s.

    Args:
        tokens: `[T, D]`; no gradient through rms(h).
        context: `[S, D]`.
        gate: `[D]`.
        offsets: int64 `[S + 1]`.
    """
    out: Tensor = _AddContext.apply(tokens, context, gate, offsets)
    return out


class _PoolSpans(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        position: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        lead: Tensor,
        queries: Tensor,
        spans: Spans,
    ) -> Tensor:
        tokens, position = tokens.contiguous(), position.contiguous()
        lead, queries = lead.float().contiguous(), queries.float().contiguous()
        (num_heads, size), num_spans = queries.shape, len(spans.starts)
        constants = _constants(tokens, num_heads)
        pooled = tokens.new_empty(num_heads, num_spans, size)
        normaliser = torch.empty(num_spans, num_heads, dtype=torch.float32, device=tokens.device)
        if num_spans:
            _pool_forward_kernel[(num_spans,)](
                tokens, position, norm_weight, norm_bias, lead, queries, *spans, pooled,
                normaliser, num_spans, **constants,
            )  # fmt: skip
        ctx.save_for_backward(
            tokens, position, norm_weight, norm_bias, lead, queries, *spans, pooled, normaliser
        )
        ctx.constants = constants
        return pooled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (tokens, position, norm_weight, norm_bias, lead, queries, starts, lengths, pooled,
         normaliser) = ctx.saved_tensors  # fmt: skip
        (num_heads, size), num_spans = queries.shape, len(starts)
        # A token of no span has no gradient, and any place will do.
        d_tokens = torch.zeros_like(tokens)
        place = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        programs = max(1, min(_PROGRAMS, num_spans))
        # Weight, bias, lead and queries, a row each.
        partial = torch.empty(
            programs, 3 + num_heads, size, dtype=torch.float32, device=tokens.device
        )
        _pool_backward_kernel[(programs,)](
            grad.contiguous(), tokens, position, norm_weight, norm_bias, lead, queries, starts,
            lengths, pooled, normaliser, d_tokens, place, partial, num_spans, **ctx.constants,
        )  # fmt: skip
        sums = partial.sum(0)
        d_position = torch.ops.aten.embedding_dense_backward(
            d_tokens, place, len(position), -1, False
        )
        return (
            d_tokens, d_position.to(position.dtype), sums[0].to(norm_weight.dtype),
            sums[1].to(norm_bias.dtype), sums[2], sums[3:], None,
        )  # fmt: skip


class _AddContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, context: Tensor, gate: Tensor, offsets: Tensor) -> Tensor:
        tokens, context = tokens.contiguous(), context.contiguous()
        out = torch.empty_like(tokens)
        if len(context):
            _add_forward_kernel[(len(context),)](
                tokens, context, gate, offsets, out, **_row_constants(tokens)
            )
        ctx.save_for_backward(tokens, context, gate, offsets)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        tokens, context, gate, offsets = ctx.saved_tensors
        grad = grad.contiguous()
        # Of every segment, the sum of grad * rms(h): both gradients follow from it.
        sums = torch.empty(context.shape, dtype=torch.float32, device=grad.device)
        if len(context):
            _add_backward_kernel[(len(context),)](
                grad, tokens, offsets, sums, **_row_constants(tokens)
            )
        d_gate = (sums * context).sum(0).to(gate.dtype)
        return grad, (sums * gate).to(context.dtype), d_gate, None


def _product_dtype(tokens: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(tokens.device.type):
        return torch.get_autocast_dtype(tokens.device.type)
    return tokens.dtype


def _constants(tokens: Tensor, num_heads: int) -> dict[str, Any]:
    kind, size = _product_dtype(tokens), tokens.shape[1]
    return {
        "EPS": _EPS,
        "H": num_heads,
        "HEADS": 16,
        "SIZE": size,
        "WIDE": max(16, triton.next_power_of_2(size)),
        "TOKENS": _TOKENS,
        "KIND": _KINDS[kind],
        "PRECISION": dot_precision(kind, tokens.device),
        "num_warps": 4 if size <= 128 else 8,
        "num_stages": 1,
    }


def _row_constants(tokens: Tensor) -> dict[str, Any]:
    size = tokens.shape[1]
    wide = triton.next_power_of_2(size)
    return {"SIZE": size, "WIDE": wide, "ROWS": max(1, min(16, 4096 // wide)), "num_warps": 4}


@triton.jit
def _normed_tile(Tokens, Position, Weight, Bias, start, rows, length, EPS: tl.constexpr,
                 SIZE: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Unit rows, their scale, and `y`; zero rows past the end."""
    places = tl.arange(0, WIDE)
    held = places < SIZE
    inside = (rows < length)[:, None] & held[None, :]
    x = tl.load(Tokens + (start + rows)[:, None] * SIZE + places[None, :], mask=inside, other=0.0)
    at = tl.load(Position + rows[:, None] * SIZE + places[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32) + at.to(tl.float32)
    mean = tl.sum(x, axis=1) / SIZE
    centred = tl.where(inside, x - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / SIZE + EPS)
    unit = centred * scale[:, None]
    weight = tl.load(Weight + places, mask=held, other=0.0).to(tl.float32)
    bias = tl.load(Bias + places, mask=held, other=0.0).to(tl.float32)
    y = tl.where(inside, unit * weight[None, :] + bias[None, :], 0.0)
    return unit, scale, y


@triton.jit
def _pool_forward_kernel(Tokens, Position, Weight, Bias, Lead, Queries, Starts, Lengths, Pooled,
                         Normaliser, num_spans, EPS: tl.constexpr, H: tl.constexpr,
                         HEADS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
                         TOKENS: tl.constexpr, KIND: tl.constexpr,
                         PRECISION: tl.constexpr):  # fmt: skip
    span = tl.program_id(0).to(tl.int64)
    start = tl.load(Starts + span)
    length = tl.load(Lengths + span).to(tl.int32)
    heads, places = tl.arange(0, HEADS), tl.arange(0, WIDE)
    mine = (heads < H)[:, None] & (places < SIZE)[None, :]
    query = tl.load(Queries + heads[:, None] * SIZE + places[None, :], mask=mine, other=0.0)
    lead = tl.load(Lead + places, mask=places < SIZE, other=0.0)

    top = tl.sum(query * lead[None, :], axis=1)
    total = tl.full((HEADS,), 1.0, dtype=tl.float32)
    acc = tl.zeros((HEADS, WIDE), dtype=tl.float32) + lead[None, :]
    query = query.to(KIND)
    for first in range(0, length, TOKENS):
        rows = first + tl.arange(0, TOKENS)
        _, _, y = _normed_tile(Tokens, Position, Weight, Bias, start, rows, length, EPS, SIZE, WIDE)
        y = y.to(KIND)
        score = tl.dot(query, tl.trans(y), input_precision=PRECISION)
        score = tl.where((rows < length)[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        share = tl.exp(score - higher[:, None])
        fade = tl.exp(top - higher)
        total = total * fade + tl.sum(share, axis=1)
        acc = tl.dot(share.to(KIND), y, acc * fade[:, None], input_precision=PRECISION)
        top = higher
    pooled = (acc / total[:, None]).to(Pooled.dtype.element_ty)
    out = Pooled + (heads.to(tl.int64)[:, None] * num_spans + span) * SIZE + places[None, :]
    tl.store(out, pooled, mask=mine)
    tl.store(Normaliser + span * H + heads, top + tl.log(total), mask=heads < H)


@triton.jit
def _pool_backward_kernel(Grad, Tokens, Position, Weight, Bias, Lead, Queries, Starts, Lengths,
                          Pooled, Normaliser, DTokens, Place, Partial, num_spans, EPS: tl.constexpr,
                          H: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr,
                          WIDE: tl.constexpr, TOKENS: tl.constexpr, KIND: tl.constexpr,
                          PRECISION: tl.constexpr):  # fmt: skip
    heads, places = tl.arange(0, HEADS), tl.arange(0, WIDE)
    held = places < SIZE
    mine = (heads < H)[:, None] & held[None, :]
    exact_query = tl.load(Queries + heads[:, None] * SIZE + places[None, :], mask=mine, other=0.0)
    query = exact_query.to(KIND)
    lead = tl.load(Lead + places, mask=held, other=0.0)
    weight = tl.load(Weight + places, mask=held, other=0.0).to(tl.float32)
    lead_score = tl.sum(exact_query * lead[None, :], axis=1)
    d_weight = tl.zeros((WIDE,), dtype=tl.float32)
    d_bias = tl.zeros((WIDE,), dtype=tl.float32)
    d_lead = tl.zeros((WIDE,), dtype=tl.float32)
    d_query = tl.zeros((HEADS, WIDE), dtype=tl.float32)
    for number in range(tl.program_id(0), num_spans, tl.num_programs(0)):
        span = tl.full((), number, tl.int64)
        start = tl.load(Starts + span)
        length = tl.load(Lengths + span).to(tl.int32)
        where = (heads.to(tl.int64)[:, None] * num_spans + span) * SIZE + places[None, :]
        grad = tl.load(Grad + where, mask=mine, other=0.0)
        pooled = tl.load(Pooled + where, mask=mine, other=0.0).to(tl.float32)
        normaliser = tl.load(Normaliser + span * H + heads, mask=heads < H, other=float("inf"))
        exact_grad = grad.to(tl.float32)
        grad = grad.to(KIND)
        mean_slope = tl.sum(exact_grad * pooled, axis=1)

        lead_share = tl.exp(lead_score - normaliser)
        lead_slope = tl.sum(exact_grad * lead[None, :], axis=1) - mean_slope
        lead_slope = (lead_share * lead_slope)[:, None]
        d_lead += tl.sum(lead_share[:, None] * exact_grad + lead_slope * exact_query, axis=0)
        d_query += lead_slope * lead[None, :]
        for first in range(0, length, TOKENS):
            rows = first + tl.arange(0, TOKENS)
            unit, scale, y = _normed_tile(
                Tokens, Position, Weight, Bias, start, rows, length, EPS, SIZE, WIDE
            )
            y = y.to(KIND)
            inside = (rows < length)[None, :]
            score = tl.dot(query, tl.trans(y), input_precision=PRECISION)
            share = tl.where(inside, tl.exp(score - normaliser[:, None]), 0.0)
            slope = tl.dot(grad, tl.trans(y), input_precision=PRECISION) - mean_slope[:, None]
            slope = (share * slope).to(KIND)
            d_query = tl.dot(slope, y, d_query, input_precision=PRECISION)
            d_y = tl.dot(tl.trans(share.to(KIND)), grad, input_precision=PRECISION)
            d_y = tl.dot(tl.trans(slope), query, d_y, input_precision=PRECISION)
            d_weight += tl.sum(d_y * unit, axis=0)
            d_bias += tl.sum(d_y, axis=0)
            d_unit = d_y * weight[None, :]
            mean = tl.sum(d_unit, axis=1) / SIZE
            product = tl.sum(d_unit * unit, axis=1) / SIZE
            d_x = (d_unit - mean[:, None] - unit * product[:, None]) * scale[:, None]
            to = DTokens + (start + rows)[:, None] * SIZE + places[None, :]
            written = rows < length
            tl.store(to, d_x.to(DTokens.dtype.element_ty), mask=written[:, None] & held[None, :])
            tl.store(Place + start + rows, rows.to(tl.int64), mask=written)
    mine_partial = Partial + tl.program_id(0) * ((3 + H) * SIZE) + places
    tl.store(mine_partial, d_weight, mask=held)
    tl.store(mine_partial + SIZE, d_bias, mask=held)
    tl.store(mine_partial + 2 * SIZE, d_lead, mask=held)
    tl.store(mine_partial[None, :] + (3 + heads)[:, None] * SIZE, d_query, mask=mine)


@triton.jit
def _add_forward_kernel(Tokens, Context, Gate, Offsets, Out, SIZE: tl.constexpr,
                        WIDE: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64)
    start, end = tl.load(Offsets + segment), tl.load(Offsets + segment + 1)
    places = tl.arange(0, WIDE)
    held = places < SIZE
    context = tl.load(Context + segment * SIZE + places, mask=held, other=0.0).to(tl.float32)
    context = context * tl.load(Gate + places, mask=held, other=0.0).to(tl.float32)
    for first in range(start, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < end)[:, None] & held[None, :]
        where = rows[:, None] * SIZE + places[None, :]
        h = tl.load(Tokens + where, mask=inside, other=0.0).to(tl.float32)
        rms = tl.sqrt(tl.sum(h * h, axis=1) / SIZE)
        out = h + rms[:, None] * context[None, :]
        tl.store(Out + where, out.to(Out.dtype.element_ty), mask=inside)


@triton.jit
def _add_backward_kernel(Grad, Tokens, Offsets, Sums, SIZE: tl.constexpr, WIDE: tl.constexpr,
                         ROWS: tl.constexpr):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64)
    start, end = tl.load(Offsets + segment), tl.load(Offsets + segment + 1)
    places = tl.arange(0, WIDE)
    held = places < SIZE
    acc = tl.zeros((ROWS, WIDE), dtype=tl.float32)
    for first in range(start, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < end)[:, None] & held[None, :]
        where = rows[:, None] * SIZE + places[None, :]
        h = tl.load(Tokens + where, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(Grad + where, mask=inside, other=0.0).to(tl.float32)
        acc += grad * tl.sqrt(tl.sum(h * h, axis=1) / SIZE)[:, None]
    tl.store(Sums + segment * SIZE + places, tl.sum(acc, axis=0), mask=held)
