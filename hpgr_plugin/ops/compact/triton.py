"""Rows of histories and candidates gathered in one pass, and their gradients back in another."""

# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpgr_plugin.ops.compact.parts import KeptRows

_ROWS = 8


def compact(history: Tensor, candidates: Tensor, kept: KeptRows) -> Tensor:
    """The operator's Triton backend, see `hpgr_plugin.ops.compact`."""
    rows: Tensor = _Gather.apply(history, candidates, *kept)
    return rows


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        history: Tensor,
        candidates: Tensor,
        index: Tensor,
        offsets: Tensor,
        num_rows: int,
        disjoint: bool,
    ) -> Tensor:
        history, candidates = history.contiguous(), candidates.contiguous()
        rows = history.new_empty(num_rows, history.shape[1])
        ctx.save_for_backward(index, offsets)
        ctx.sizes = (len(history), len(candidates), disjoint)
        if num_rows:
            _gather_kernel[(triton.cdiv(num_rows, _ROWS),)](
                history, candidates, index, offsets, rows, num_rows,
                len(history), len(candidates), SIZE=history.shape[1],
                WIDE=triton.next_power_of_2(history.shape[1]), ROWS=_ROWS, num_warps=4,
            )  # fmt: skip
        return rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, offsets = ctx.saved_tensors
        num_history, num_candidates, disjoint = ctx.sizes
        grad, size = grad.contiguous(), grad.shape[1]
        # Rows that share an item add up in float32: half precision would lose the small ones.
        dtype = grad.dtype if disjoint else torch.float32
        d_history = torch.zeros(num_history, size, dtype=dtype, device=grad.device)
        d_candidates = grad.new_empty(num_candidates, size)
        if len(grad):
            _scatter_kernel[(triton.cdiv(len(grad), _ROWS),)](
                grad, index, offsets, d_history, d_candidates, len(grad), num_history,
                num_candidates, DISJOINT=disjoint, SIZE=size,
                WIDE=triton.next_power_of_2(size), ROWS=_ROWS, num_warps=4,
            )  # fmt: skip
        return d_history.to(grad.dtype), d_candidates, None, None, None, None


@triton.jit
def _gather_kernel(History, Candidates, Index, Offsets, Out, num_rows, num_history,
                   num_candidates, SIZE: tl.constexpr, WIDE: tl.constexpr,
                   ROWS: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    used = rows < tl.load(Offsets + num_candidates)
    index = tl.load(Index + rows, mask=used, other=0).to(tl.int64)
    places = tl.arange(0, WIDE)[None, :]
    held = places < SIZE
    from_history = used & (index < num_history)
    from_candidate = used & (index >= num_history)
    item = tl.load(History + index[:, None] * SIZE + places,
                   mask=from_history[:, None] & held, other=0.0)  # fmt: skip
    candidate = tl.load(Candidates + (index - num_history)[:, None] * SIZE + places,
                        mask=from_candidate[:, None] & held, other=0.0)  # fmt: skip
    value = tl.where(from_candidate[:, None], candidate, item)
    tl.store(Out + rows[:, None] * SIZE + places, value, mask=(rows < num_rows)[:, None] & held)


@triton.jit
def _scatter_kernel(Grad, Index, Offsets, DHistory, DCandidates, num_rows, num_history,
                    num_candidates, DISJOINT: tl.constexpr, SIZE: tl.constexpr,
                    WIDE: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    used = rows < tl.minimum(tl.load(Offsets + num_candidates), num_rows)
    index = tl.load(Index + rows, mask=used, other=0).to(tl.int64)
    places = tl.arange(0, WIDE)[None, :]
    held = places < SIZE
    grad = tl.load(Grad + rows[:, None] * SIZE + places, mask=used[:, None] & held, other=0.0)
    to_history = (used & (index < num_history))[:, None] & held
    to_candidate = (used & (index >= num_history))[:, None] & held
    item = DHistory + index[:, None] * SIZE + places
    if DISJOINT:
        tl.store(item, grad, mask=to_history)
    else:
        tl.atomic_add(item, grad.to(tl.float32), mask=to_history, sem="relaxed")
    candidate = DCandidates + (index - num_history)[:, None] * SIZE + places
    tl.store(candidate, grad, mask=to_candidate)
