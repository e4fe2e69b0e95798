"""Cutting a history into sessions (section 3.2 of the paper, before Eq. 1)."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from hpgr_plugin.components.checks import check_at_least, check_jagged
from hpgr_plugin.ops.jagged import check_sorted

_YEAR_5000 = 95_617_584_000  # in seconds since 1970


class Sessions(NamedTuple):
    """The sessions of a batch of histories: tokens -> sessions -> users, by offsets.

    Attributes:
        session_offsets: int64 `[S + 1]`; session s owns tokens
            `session_offsets[s]:session_offsets[s + 1]`, at least one.
        user_offsets: int64 `[B + 1]`; user b owns sessions `user_offsets[b]:user_offsets[b + 1]`,
            none if the history is empty.
        session_index: int64 `[T]`, the session of every token.
    """

    session_offsets: Tensor
    user_offsets: Tensor
    session_index: Tensor


def partition_sessions(timestamps: Tensor, offsets: Tensor, gap_seconds: int = 1800) -> Sessions:
    """Start a new session wherever `t_i - t_{i-1} > gap_seconds`; equal times stay together.

    Args:
        timestamps: integer `[T]`, seconds, ascending inside every user.
        offsets: int32 or int64 `[B + 1]`; user b owns tokens `offsets[b]:offsets[b + 1]`.
        gap_seconds: the longest pause inside a session, seconds.

    Raises:
        ValueError: a negative gap, offsets that do not fit the timestamps, or a history out of
            order; the message names the argument, or the row and the token.
        TypeError: timestamps or offsets that are not integers.
    """
    check_at_least(0, gap_seconds=gap_seconds)
    for name, tensor in (("timestamps", timestamps), ("offsets", offsets)):
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{name} must be integers, got {tensor.dtype}")
    check_jagged(timestamps, offsets, "timestamps")
    total = timestamps.numel()
    offsets = offsets.long()

    # One place more than tokens: there begin the users at the end who have no history.
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


def check_time_unit(
    timestamps: Tensor, offsets: Tensor, gap_seconds: int = 1800, binding: str = ""
) -> None:
    """Warn where the timestamps do not look like seconds.

    The signs: times after the year 5000 (milliseconds since 1970 are), a median pause below 1 s
    between neighbouring items (for example one time for a whole history), or more sessions than
    half of the items. Histories of one item have no pauses and are not counted. Some logs in
    seconds show the last two as well: whole pages of ratings sent at once, or one visit per item.

    Args:
        timestamps: integer `[T]`, ascending inside every user.
        offsets: `[B + 1]`.
        gap_seconds: the longest pause inside a session, seconds.
        binding: the gin parameter that says the unit, if there is one.
    """
    offsets = offsets.long()
    inside = torch.ones(timestamps.numel() + 1, dtype=torch.bool, device=timestamps.device)
    inside[offsets] = False
    pauses = timestamps.diff()[inside[1:-1]]
    if pauses.numel() == 0:
        return
    histories = int((offsets.diff() > 1).sum())
    items = histories + pauses.numel()
    sessions = histories + int((pauses > gap_seconds).sum())
    if (latest := int(timestamps.max())) > _YEAR_5000:
        sign = f"the latest is {latest}, milliseconds?"
    elif pauses.median() < 1:
        sign = "the median pause between neighbouring items is below 1 s"
    elif sessions > items / 2:
        sign = f"{items} items fall into {sessions} sessions of gap_seconds = {gap_seconds}"
    else:
        return
    hint = f"; {binding} names their unit" if binding else ""
    warnings.warn(f"timestamps do not look like seconds: {sign}{hint}", stacklevel=2)
