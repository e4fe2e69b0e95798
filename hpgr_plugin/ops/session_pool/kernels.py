"""The kernels of `triton.py`: one program per session, or per segment of tokens."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


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
def pool_forward_kernel(Tokens, Position, Weight, Bias, Lead, Queries, Starts, Lengths, Pooled,
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
def pool_backward_kernel(Grad, Tokens, Position, Weight, Bias, Lead, Queries, Starts, Lengths,
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
def _segment(Offsets, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """The segment of this program, its first and last token, and the places of a row."""
    segment = tl.program_id(0).to(tl.int64)
    start, end = tl.load(Offsets + segment), tl.load(Offsets + segment + 1)
    places = tl.arange(0, WIDE)
    return segment, start, end, places, places < SIZE


@triton.jit
def _tile_with_rms(Tokens, first, end, places, held, SIZE: tl.constexpr, ROWS: tl.constexpr):
    """A tile of rows, where it lies, and the root mean square of each row."""
    rows = first + tl.arange(0, ROWS)
    inside = (rows < end)[:, None] & held[None, :]
    where = rows[:, None] * SIZE + places[None, :]
    h = tl.load(Tokens + where, mask=inside, other=0.0).to(tl.float32)
    return h, where, inside, tl.sqrt(tl.sum(h * h, axis=1) / SIZE)


@triton.jit
def add_forward_kernel(Tokens, Context, Gate, Offsets, Out, SIZE: tl.constexpr,
                       WIDE: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    segment, start, end, places, held = _segment(Offsets, SIZE, WIDE)
    context = tl.load(Context + segment * SIZE + places, mask=held, other=0.0).to(tl.float32)
    context = context * tl.load(Gate + places, mask=held, other=0.0).to(tl.float32)
    for first in range(start, end, ROWS):
        h, where, inside, rms = _tile_with_rms(Tokens, first, end, places, held, SIZE, ROWS)
        out = h + rms[:, None] * context[None, :]
        tl.store(Out + where, out.to(Out.dtype.element_ty), mask=inside)


@triton.jit
def add_backward_kernel(Grad, Tokens, Offsets, Sums, SIZE: tl.constexpr, WIDE: tl.constexpr,
                        ROWS: tl.constexpr):  # fmt: skip
    segment, start, end, places, held = _segment(Offsets, SIZE, WIDE)
    acc = tl.zeros((ROWS, WIDE), dtype=tl.float32)
    for first in range(start, end, ROWS):
        _, where, inside, rms = _tile_with_rms(Tokens, first, end, places, held, SIZE, ROWS)
        grad = tl.load(Grad + where, mask=inside, other=0.0).to(tl.float32)
        acc += grad * rms[:, None]
    tl.store(Sums + segment * SIZE + places, tl.sum(acc, axis=0), mask=held)
