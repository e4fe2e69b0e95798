"""HSTU attention over jagged sequences, by the fastest kernel that knows the case.

The Triton kernels need CUDA tensors, float32, bfloat16 or float16, and head sizes that are
powers of two from 16 to 256; they know no additive bias. Everything else runs in padded torch;
on CUDA, where that is slow, it is said once why.
"""

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from hpgr_plugin.ops.dispatch import triton_is_installed, warn_once
from hpgr_plugin.ops.jagged import dense_to_jagged, jagged_to_padded_dense

_KERNELS = ("auto", "torch", "triton")
_WEIGHTS_APPLY = ("post", "pre")


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    max_length: int,
    alpha: float,
    norm_length: float,
    column_weights: Tensor | None = None,
    mask_position: str = "post",
    num_targets: Tensor | None = None,
    query_offsets: Tensor | None = None,
    max_query_length: int | None = None,
    bias: Tensor | None = None,
    exact: bool = False,
    kernel: str = "auto",
) -> Tensor:
    """`o_i = sum_j SiLU(alpha q_i . k_j + bias_ij) w_j / norm_length * v_j`, causal.

    Row i of a sequence reads the columns j <= i. The last `num_targets[b]` rows of sequence b
    are targets: nobody reads them but themselves.

    Args:
        q: queries `[T, H, d]`; `[Tq, H, d]` with `query_offsets`.
        k: keys `[T, H, d]`.
        v: values `[T, H, dv]`.
        offsets: `[B + 1]` int32 or int64. Rows beyond `offsets[-1]` come out zero.
        exact: there are no such rows: saves setting them.
        max_length: an upper bound of the sequence lengths, known without asking the device.
        alpha: factor on `q . k`.
        norm_length: the n of 1 / n: the length of the full, not of the shortened sequence.
        column_weights: M `[T]` (Eq. 5), no gradient: `SiLU(s) M` ("post"), `SiLU(M s)` ("pre").
        num_targets: `[B]`, or None for one stream without targets.
        query_offsets: `[B + 1]`: q holds only the last rows of every sequence, as many as these
            offsets say (the last layer needs its candidates alone).
        max_query_length: an upper bound of those; `max_length` where it is None.
        bias: additive `[B or 1, H or 1, max_length, max_length]`, by (row, column); torch only.
        kernel: "auto", "torch" or "triton".

    Returns:
        `[T, H, dv]`, or `[Tq, H, dv]`.

    Raises:
        ValueError: an argument of the wrong shape or an unknown name; kernel="triton" where the
            Triton kernel does not know the case.
    """
    _check_arguments(q, k, v, offsets, column_weights, mask_position, query_offsets, kernel)
    reason = "torch was asked for" if kernel == "torch" else _why_not_triton(q, v, bias, kernel)
    if kernel == "triton" and reason is not None:
        raise ValueError(f"kernel='triton' does not know this case: {reason}")
    if reason is None:
        from hpgr_plugin.ops.hstu_attention.triton import triton_hstu_attention

        return triton_hstu_attention(
            q,
            k,
            v,
            offsets,
            max_length=max_length,
            alpha=alpha,
            norm_length=norm_length,
            column_weights=column_weights,
            mask_position=mask_position,
            num_targets=num_targets,
            query_offsets=query_offsets,
            max_query_length=max_query_length,
            exact=exact,
        )
    if kernel == "auto" and q.is_cuda:
        warn_once(f"HSTU attention runs in padded torch: {reason}")
    return padded_hstu_attention(
        q,
        k,
        v,
        offsets,
        max_length=max_length,
        alpha=alpha,
        norm_length=norm_length,
        column_weights=column_weights,
        mask_position=mask_position,
        num_targets=num_targets,
        query_offsets=query_offsets,
        max_query_length=max_query_length,
        bias=bias,
    )


def padded_hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    max_length: int,
    alpha: float,
    norm_length: float,
    column_weights: Tensor | None = None,
    mask_position: str = "post",
    num_targets: Tensor | None = None,
    query_offsets: Tensor | None = None,
    max_query_length: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The same in plain torch over padded `[B, H, N, N]` scores: any device, any float dtype."""
    if query_offsets is None:
        query_offsets, num_rows = offsets, max_length
    else:
        num_rows = max_length if max_query_length is None else max_query_length
    lengths = offsets.diff()
    # [B, N, H, d] to [B, H, N, d]
    padded_q = jagged_to_padded_dense(q, query_offsets, num_rows).transpose(1, 2)
    padded_k = jagged_to_padded_dense(k, offsets, max_length).transpose(1, 2)
    padded_v = jagged_to_padded_dense(v, offsets, max_length).transpose(1, 2)
    columns = torch.arange(max_length, device=q.device)
    # Queries are the last rows of their sequence: this is the place of each, [B, R].
    rows = (lengths - query_offsets.diff())[:, None] + torch.arange(num_rows, device=q.device)

    scores = torch.matmul(padded_q, padded_k.transpose(2, 3)) * alpha
    if bias is not None:
        suffix = query_offsets is not offsets
        scores = scores + (_bias_of_rows(bias, rows) if suffix else bias)
    weights = None
    if column_weights is not None:
        weights = jagged_to_padded_dense(column_weights[:, None].to(q.dtype), offsets, max_length)
        weights = weights.view(-1, 1, 1, max_length)
    if weights is not None and mask_position == "pre":
        scores = scores * weights
    seen = rows[:, :, None] >= columns
    if num_targets is not None:
        history = columns < (lengths - num_targets)[:, None]
        seen = seen & (history[:, None, :] | (rows[:, :, None] == columns))
    attention = F.silu(scores) / norm_length
    if weights is not None and mask_position == "post":
        attention = attention * weights
    attention = attention * seen[:, None].to(attention.dtype)
    output = torch.matmul(attention, padded_v).transpose(1, 2)
    return dense_to_jagged(output, query_offsets, q.shape[0])


def _bias_of_rows(bias: Tensor, rows: Tensor) -> Tensor:
    """The rows `[B, R]` of a bias `[B or 1, H or 1, N, N]`."""
    num_sequences, num_rows = rows.shape
    index = rows.clamp(0, bias.shape[2] - 1).view(num_sequences, 1, num_rows, 1)
    index = index.expand(-1, bias.shape[1], -1, bias.shape[3])
    return bias.expand(num_sequences, -1, -1, -1).gather(2, index)


def _why_not_triton(q: Tensor, v: Tensor, bias: Tensor | None, kernel: str) -> str | None:
    # The interpreter knows every device, but is for tests: it runs only when asked for.
    interpreted = kernel == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if not q.is_cuda and not interpreted:
        return f"the tensors are on {q.device.type}, not on a CUDA device"
    if not triton_is_installed():
        return "triton is not installed"
    if bias is not None:
        return "there is an additive bias"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {q.dtype}"
    for name, size in (("q and k", q.shape[2]), ("v", v.shape[2])):
        if not 16 <= size <= 256 or size & (size - 1):
            return f"the head size of {name} is {size}, no power of two from 16 to 256"
    return None


def _check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    column_weights: Tensor | None,
    mask_position: str,
    query_offsets: Tensor | None,
    kernel: str,
) -> None:
    if kernel not in _KERNELS:
        raise ValueError(f"kernel must be one of {_KERNELS}, got {kernel!r}")
    if mask_position not in _WEIGHTS_APPLY:
        raise ValueError(f"mask_position must be one of {_WEIGHTS_APPLY}, got {mask_position!r}")
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise ValueError(
            "q, k and v must be [T, H, d], got "
            f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if k.shape[:2] != v.shape[:2] or q.shape[1:] != k.shape[1:]:
        raise ValueError(
            "q and k must agree in heads and size, k and v in rows and heads, got "
            f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if query_offsets is None and q.shape[0] != k.shape[0]:
        raise ValueError(
            f"q has {q.shape[0]} rows and k {k.shape[0]}: give query_offsets where they differ"
        )
    if query_offsets is not None and query_offsets.shape != offsets.shape:
        raise ValueError(
            f"query_offsets must be {list(offsets.shape)} as offsets, "
            f"got {list(query_offsets.shape)}"
        )
    if column_weights is not None and column_weights.shape != k.shape[:1]:
        raise ValueError(
            f"column_weights must be [T] = [{k.shape[0]}], got {list(column_weights.shape)}"
        )
