"""SEM's two passes as kernels that read every token once, and once more backward.

The [CLS] token is the same for every session, so its queries are too. The tokens only need
attention of H queries over layer-normed rows that are keys and values alike. Nothing is added
atomically: every run gives the same bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpgr_plugin.ops.dispatch import dot_precision, product_dtype
from hpgr_plugin.ops.session_pool.kernels import (
    add_backward_kernel,
    add_forward_kernel,
    pool_backward_kernel,
    pool_forward_kernel,
)
from hpgr_plugin.ops.session_pool.pool import PooledSessions, PoolWeights, Spans

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


def session_pool(
    tokens: Tensor, position: Tensor, cls: Tensor, weights: PoolWeights, spans: Spans
) -> PooledSessions:
    """See `hpgr_plugin.ops.session_pool.session_pool`."""
    lead = weights.norm(cls.unsqueeze(0))
    queries = weights.queries_of(lead).squeeze(0)
    norm = weights.norm_weight, weights.norm_bias
    means = _PoolSpans.apply(tokens, position, *norm, lead.squeeze(0), queries, spans)
    return PooledSessions(cls.expand(len(spans.starts), -1), means, None)


def add_context(tokens: Tensor, context: Tensor, gate: Tensor, offsets: Tensor) -> Tensor:
    """See `hpgr_plugin.ops.session_pool.add_context`."""
    out: Tensor = _AddContext.apply(tokens, context, gate, offsets)
    return out


def why_not_session_pool(
    tokens: Tensor, _position: Tensor, _cls: Tensor, weights: PoolWeights, _spans: Spans
) -> str | None:
    """Why the kernels do not support the case, or None."""
    if len(weights.query) > LARGEST_HEADS:
        return f"{len(weights.query)} heads, more than {LARGEST_HEADS}"
    return why_not_add_context(tokens)


def why_not_add_context(tokens: Tensor, *_: Tensor) -> str | None:
    """The same for `add_context`."""
    if tokens.dtype not in _KINDS:
        return f"dtype {tokens.dtype}"
    kind = product_dtype(tokens)
    largest = LARGEST_EMBEDDING_FLOAT32 if kind == torch.float32 else LARGEST_EMBEDDING
    if tokens.shape[1] > largest:
        return f"embedding_dim {tokens.shape[1]}, more than {largest} in {kind}"
    return None


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
            pool_forward_kernel[(num_spans,)](
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
        # A token of no span has gradient zero; its place is arbitrary.
        d_tokens = torch.zeros_like(tokens)
        place = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        programs = max(1, min(_PROGRAMS, num_spans))
        # Weight, bias, lead and queries, a row each.
        partial = torch.empty(
            programs, 3 + num_heads, size, dtype=torch.float32, device=tokens.device
        )
        pool_backward_kernel[(programs,)](
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
            add_forward_kernel[(len(context),)](
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
            add_backward_kernel[(len(context),)](
                grad, tokens, offsets, sums, **_row_constants(tokens)
            )
        d_gate = (sums * context).sum(0).to(gate.dtype)
        return grad, (sums * gate).to(context.dtype), d_gate, None


def _constants(tokens: Tensor, num_heads: int) -> dict[str, Any]:
    kind, size = product_dtype(tokens), tokens.shape[1]
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
