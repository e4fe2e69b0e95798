"""Softmax attention inside the segments of a jagged tensor, padded in buckets.

Segments are sorted by length and cut into buckets in which at most `PADDING_BUDGET` of the slots
are padding; every bucket is padded and attended by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hpgr_plugin.ops.jagged import complete_cumsum, dense_to_jagged, jagged_to_padded_dense, ranges

PADDING_BUDGET = 0.2  # share of a bucket's slots that may be padding
# On CUDA a launch costs more than this many slots: up to here they are one bucket, however padded.
SMALL_BUCKET_SLOTS_CUDA = 2**15
MAX_BUCKET_ROWS = 16384  # batch x heads stays inside the launch grid of every attention kernel
# Without cuDNN: it compiles a plan for every new shape, and bucket shapes are new at every step.
SDPA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Bucket(NamedTuple):
    """Segments of similar length that are padded and attended together.

    Attributes:
        offsets: int64 `[R + 1]` into the bucket's own tokens.
        num_tokens: tokens in the bucket.
        width: length of the longest segment.
        mask: bool, True where a query may look, broadcastable to `[R, heads, width, width]`, or
            None where it may look at every slot (if `is_causal`, at its own and earlier ones).
        is_causal: whether queries look at their own and earlier slots only; False with a `mask`.
    """

    offsets: Tensor
    num_tokens: int
    width: int
    mask: Tensor | None
    is_causal: bool


class SegmentLayout(NamedTuple):
    """How `[T]` tokens of S segments are ordered and cut for attention.

    Attributes:
        order: int64 `[T]`, the given tokens with the longest segments first.
        inverse: int64 `[T]`, the place of every given token in that order.
        starts: int64 `[S]`, where the segments start in that order, ascending.
        segment_inverse: int64 `[S]`, the place of every given segment in `starts`.
        buckets: consecutive slices of the ordered tokens.
    """

    order: Tensor
    inverse: Tensor
    starts: Tensor
    segment_inverse: Tensor
    buckets: tuple[Bucket, ...]

    @property
    def num_slots(self) -> int:
        """Slots after padding; the share of padding is `1 - T / num_slots`."""
        return sum((bucket.offsets.numel() - 1) * bucket.width for bucket in self.buckets)


def plan_buckets(
    lengths: Sequence[int],
    counts: Sequence[int],
    small_slots: int = 0,
) -> list[tuple[int, int, int]]:
    """Cut segments, longest first, into buckets with at most `PADDING_BUDGET` of padding.

    Args:
        lengths: distinct positive lengths, descending.
        counts: how many segments have each length.
        small_slots: up to this number of slots the budget does not apply.

    Returns:
        `(rows, tokens, width)` of every bucket: segments, tokens and longest segment.
    """
    buckets: list[tuple[int, int, int]] = []
    rows = tokens = width = 0
    for length, count in zip(lengths, counts, strict=True):
        while count:
            width = width or length
            taken = min(count, MAX_BUCKET_ROWS - rows)
            slots = (rows + taken) * width
            waste = slots - (tokens + taken * length)
            if taken == 0 or (waste > PADDING_BUDGET * slots and slots > small_slots):
                buckets.append((rows, tokens, width))
                rows = tokens = width = 0
                continue
            rows, tokens, count = rows + taken, tokens + taken * length, count - taken
    if rows:
        buckets.append((rows, tokens, width))
    return buckets


def segment_layout(
    offsets: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    sink: bool = False,
    device_type: str | None = None,
) -> SegmentLayout:
    """Plan the attention inside segments.

    Args:
        offsets: `[S + 1]`; a segment may be empty.
        causal: a token sees itself and earlier ones; otherwise its whole segment.
        window: how many tokens, itself included, a token sees; for `causal` only.
        sink: all tokens also see the first one of their segment; for a `window` only.
        device_type: where the attention will run, "cuda" or "cpu", for a layout that is made on
            the host and moved there; None: where the offsets are.
    """
    lengths = offsets.long().diff()
    segment_order = lengths.argsort(descending=True, stable=True)
    sorted_lengths = lengths[segment_order]
    order = ranges(offsets[:-1].long()[segment_order], sorted_lengths)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    segment_inverse = torch.empty_like(segment_order)
    segment_inverse[segment_order] = torch.arange(len(lengths), device=order.device)

    distinct, counts = torch.stack(lengths[lengths > 0].unique(return_counts=True)).flip(1).tolist()
    buckets = []
    first_row = 0
    small_slots = SMALL_BUCKET_SLOTS_CUDA if (device_type or offsets.device.type) == "cuda" else 0
    for rows, tokens, width in plan_buckets(distinct, counts, small_slots=small_slots):
        bucket_lengths = sorted_lengths[first_row : first_row + rows]
        mask = _visible(bucket_lengths, width, rows * width == tokens, causal, window, sink)
        buckets.append(
            Bucket(complete_cumsum(bucket_lengths), tokens, width, mask, causal and mask is None)
        )
        first_row += rows
    starts = complete_cumsum(sorted_lengths)[:-1]
    return SegmentLayout(order, inverse, starts, segment_inverse, tuple(buckets))


def _visible(
    lengths: Tensor, width: int, full: bool, causal: bool, window: int | None, sink: bool
) -> Tensor | None:
    slot = torch.arange(width, device=lengths.device)
    if not causal:
        return None if full else (slot < lengths[:, None])[:, None, None, :]
    if window is None or width <= window:
        return None  # padding comes after every real token, so causality hides it
    back = slot[:, None] - slot[None, :]
    seen = (back >= 0) & (back < window)
    return seen | ((slot == 0)[None, :] & (back >= 0)) if sink else seen


def segment_attention(qkv: Tensor, layout: SegmentLayout) -> Tensor:
    """Softmax attention inside every segment.

    Args:
        qkv: `[T, 3, H, d]`, tokens in the layout's order.
        layout: of the segments.

    Returns:
        `[T, H * d]`, in the layout's order.
    """
    _, _, heads, head_dim = qkv.shape
    flat = qkv.flatten(1)
    if not layout.buckets:
        return flat[:, : heads * head_dim]
    pieces = []
    sizes = [bucket.num_tokens for bucket in layout.buckets]
    for chunk, bucket in zip(flat.split(sizes), layout.buckets, strict=True):
        padded = jagged_to_padded_dense(chunk, bucket.offsets, bucket.width)
        rows = padded.shape[0]
        q, k, v = padded.view(rows, bucket.width, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(SDPA_BACKENDS):
            attended = F.scaled_dot_product_attention(
                q, k, v, attn_mask=bucket.mask, is_causal=bucket.is_causal
            )
        attended = attended.transpose(1, 2).reshape(rows, bucket.width, heads * head_dim)
        pieces.append(dense_to_jagged(attended, bucket.offsets, bucket.num_tokens))
    return torch.cat(pieces)


def first_token_attention(queries: Tensor, tokens: Tensor, layout: SegmentLayout) -> Tensor:
    """For every segment, the mean of its tokens weighted by the softmax of `queries . tokens`.

    Args:
        queries: `[S, H, D]`, already scaled, longest segments first.
        tokens: `[T, D]`, in the layout's order.
        layout: of the segments, not causal.

    Returns:
        `[S, H, D]`, in the order of `queries`.
    """
    if not layout.buckets:
        return queries
    pieces = []
    rows = [bucket.offsets.numel() - 1 for bucket in layout.buckets]
    sizes = [bucket.num_tokens for bucket in layout.buckets]
    chunks = zip(queries.split(rows), tokens.split(sizes), layout.buckets, strict=True)
    for query, chunk, bucket in chunks:
        padded = jagged_to_padded_dense(chunk, bucket.offsets, bucket.width)
        scores = torch.bmm(query, padded.transpose(1, 2))
        if bucket.mask is not None:
            scores = scores.masked_fill(~bucket.mask.squeeze(1), -torch.inf)
        pieces.append(torch.bmm(scores.softmax(-1).to(padded.dtype), padded))
    return torch.cat(pieces)


def segment_mean(values: Tensor, layout: SegmentLayout) -> Tensor:
    """The mean of the tokens that each token sees, `[T, D]`: attention with equal scores."""
    equal = torch.zeros_like(values)
    qkv = torch.stack([equal, equal, values], dim=1).index_select(0, layout.order)
    return segment_attention(qkv.unsqueeze(2), layout).index_select(0, layout.inverse)
