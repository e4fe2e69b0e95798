"""The buckets of `PositionTimeBias` for whole tensors, in integers only, so that all agree."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hpgr_plugin.ops.hstu_attention.naive import position_bucket
from hpgr_plugin.ops.hstu_attention.spec import PositionTimeBias

_MANTISSA_BITS, _EXPONENT_OF_ONE = 52, 1023


def buckets_by_distance(bias: PositionTimeBias, device: torch.device) -> Tensor:
    """The bucket of every distance -F to F, int32 `[2 F + 1]`; beyond F it is that of F."""
    return _by_distance(len(bias.position_table), bias.exact_positions, device)


@functools.cache
def _by_distance(size: int, exact: int, device: torch.device) -> Tensor:
    bias = PositionTimeBias(torch.empty(size), torch.empty(1), exact)
    far = 64 * exact  # the last bucket starts before it
    buckets = [position_bucket(distance, bias) for distance in range(-far, far + 1)]
    return torch.tensor(buckets, dtype=torch.int32, device=device)


def time_buckets(seconds: Tensor, size: int) -> Tensor:
    """floor(log2(1 + |seconds|)), at most `size - 1`, of int64 seconds below 2^53; int64.

    The logarithm is the exponent of the number as a double, which holds it exactly.
    """
    exponent = (seconds.abs() + 1).double().view(torch.int64) >> _MANTISSA_BITS
    return (exponent - _EXPONENT_OF_ONE).clamp_(max=size - 1)
