"""Checks of arguments, for all components: a message names the argument and what it got."""

from __future__ import annotations

import itertools
import math

from torch import Tensor

from hpgr_plugin.errors import HpgrError


def check_at_least(minimum: float, **values: float) -> None:
    """Raises `HpgrError` for the first argument below the minimum."""
    for name, value in values.items():
        if value < minimum:
            raise HpgrError(f"{name} must be at least {minimum}, got {value}")


def check_share(**values: float) -> None:
    """Raises `HpgrError` for the first argument that is not in [0, 1]."""
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise HpgrError(f"{name} must be in [0, 1], got {value}")


def check_finite(**values: float) -> None:
    """Raises `HpgrError` for the first argument that is infinite or not a number."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise HpgrError(f"{name} must be a finite number, got {value}")


def check_choice(choices: tuple[str, ...], **values: str) -> None:
    """Raises `HpgrError` for the first argument that is none of the choices."""
    for name, value in values.items():
        if value not in choices:
            raise HpgrError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_jagged(values: Tensor, offsets: Tensor, name: str, offsets_name: str = "offsets") -> None:
    """The offsets must ascend from 0 to the number of values.

    Args:
        values: to be `[T]`.
        offsets: to be `[B + 1]`.
        name: of the values, for the message.
        offsets_name: of the offsets, for the message.

    Raises:
        ValueError: shapes or offsets that do not fit.
    """
    if offsets.dim() != 1 or offsets.numel() == 0:
        raise ValueError(f"{offsets_name} must be [B + 1], got shape {list(offsets.shape)}")
    ends = offsets.tolist()  # one copy to the host: the comparisons below cost no further wait
    if values.shape != (ends[-1],):
        raise ValueError(
            f"{name} must have the {ends[-1]} rows that {offsets_name} end at, "
            f"got shape {list(values.shape)}"
        )
    smallest = min((b - a for a, b in itertools.pairwise(ends)), default=0)
    if ends[0] != 0 or smallest < 0:
        raise ValueError(
            f"{offsets_name} must ascend from 0, got first {ends[0]}, smallest step {smallest}"
        )
