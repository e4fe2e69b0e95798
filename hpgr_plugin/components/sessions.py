"""Cutting a history into sessions (section 3.2 of the paper, before Eq. 1)."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from hpgr_plugin.ops.jagged import check_sorted


class Sessions(NamedTuple):
    """The sessions of a batch of histories: tokens -> sessions -> users, by offsets.

    Attributes:
        session_offsets: int64 `[S + 1]`, session s owns tokens
            `session_offsets[s]:session_offsets[s + 1]`; no session is empty.
        user_offsets: int64 `[B + 1]`, user b owns sessions `user_offsets[b]:user_offsets[b + 1]`;
            a user without history owns none.
        session_index: int64 `[T]`, the session of every token.
    """

    session_offsets: Tensor
    user_offsets: Tensor
    session_index: Tensor


def partition_sessions(timestamps: Tensor, offsets: Tensor, gap_seconds: int = 1800) -> Sessions:
    """Start a new session wherever `t_i - t_{i-1} > gap_seconds`; ties stay together.

    Args:
        timestamps: integer `[T]`, seconds, ascending inside every user.
        offsets: int32 or int64 `[B + 1]`, user b owns tokens `offsets[b]:offsets[b + 1]`.
        gap_seconds: the longest pause inside a session, seconds, 0 or more.

    Raises:
        ValueError: a negative gap, offsets that do not fit the timestamps, or a history out of
            order; the message names the argument, or the row and the token.
        TypeError: timestamps or offsets that are not integers.
    """
    if gap_seconds < 0:
        raise ValueError(f"gap_seconds must be 0 or more seconds, got {gap_seconds}")
    _check_shapes(timestamps, offsets)
    total = timestamps.numel()
    offsets = offsets.long()

    # One slot more than tokens: trailing users without history begin there.
    opens_session = torch.zeros(total + 1, dtype=torch.bool, device=timestamps.device)
    opens_session[offsets] = True
    opens_session = opens_session[:total]
    pauses = timestamps.diff()
    if ((pauses < 0) & ~opens_session[1:]).any():
        check_sorted(timestamps, offsets, "timestamps")
    opens_session[1:] |= pauses > gap_seconds
    sessions_so_far = opens_session.long().cumsum(0)
    starts = opens_session.nonzero().squeeze(1)
    before = torch.cat([sessions_so_far.new_zeros(1), sessions_so_far])
    return Sessions(
        session_offsets=torch.cat([starts, starts.new_full((1,), total)]),
        user_offsets=before[offsets],
        session_index=sessions_so_far - 1,
    )


def _check_shapes(timestamps: Tensor, offsets: Tensor) -> None:
    for name, tensor in (("timestamps", timestamps), ("offsets", offsets)):
        if tensor.dim() != 1:
            raise ValueError(f"{name} must have one dimension, got shape {tuple(tensor.shape)}")
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{name} must be integers, got {tensor.dtype}")
    if offsets.numel() == 0:
        raise ValueError("offsets must have B + 1 entries, got none")
    total = timestamps.numel()
    ends = offsets.tolist()  # few: compared here they cost one wait for the device
    if ends[0] != 0 or ends[-1] != total or any(a > b for a, b in itertools.pairwise(ends)):
        smallest = min((b - a for a, b in itertools.pairwise(ends)), default="none")
        raise ValueError(
            f"offsets must ascend from 0 to the {total} timestamps, "
            f"got first {ends[0]}, last {ends[-1]}, smallest step {smallest}"
        )
