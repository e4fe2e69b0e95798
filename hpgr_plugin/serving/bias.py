"""The relative bias of the layers for given distances, apart from an attention's specification."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hpgr_plugin.ops.hstu_attention import PositionTimeBias
from hpgr_plugin.ops.hstu_attention.naive import position_bucket

_MANTISSA_BITS, _EXPONENT_OF_ONE = 52, 1023


def position_time_bias(
    distance: Tensor, seconds: Tensor, tables: PositionTimeBias, buckets: Tensor | None = None
) -> Tensor:
    """`position_table[bucket(distance)] + time_table[log2(1 + seconds)]`, in the shape of both.

    Args:
        distance: int64, a query's position minus a key's.
        seconds: int64, absolute difference of their times.
        tables: of one layer.
        buckets: of `distance_buckets`; None looks them up.
    """
    return joint_table(tables)[bias_places(distance, seconds, tables, buckets)]


def joint_table(tables: PositionTimeBias) -> Tensor:
    """The bias of every pair of buckets, `[P * T]`; `bias_places` are its rows."""
    return (tables.position_table.unsqueeze(1) + tables.time_table).flatten()


def bias_places(
    distance: Tensor, seconds: Tensor, tables: PositionTimeBias, buckets: Tensor | None = None
) -> Tensor:
    """Rows of `joint_table`, int64; they are the same for layers with tables of one size.

    Args:
        distance, seconds, tables, buckets: see `position_time_bias`.
    """
    if buckets is None:
        buckets = distance_buckets(tables, distance.device)
    far = len(buckets) // 2
    position = buckets[distance.clamp(-far, far) + far]
    # The exponent of a double is the whole part of its logarithm, without rounding.
    time = ((seconds + 1).double().view(torch.int64) >> _MANTISSA_BITS) - _EXPONENT_OF_ONE
    size = len(tables.time_table)
    return position * size + time.clamp(max=size - 1)


def distance_buckets(tables: PositionTimeBias, device: torch.device) -> Tensor:
    """The bucket of every distance from -F to F, int64; the last one begins before F."""
    return _by_distance(len(tables.position_table), tables.exact_positions, device)


@functools.cache
def _by_distance(size: int, exact: int, device: torch.device) -> Tensor:
    tables = PositionTimeBias(torch.empty(size), torch.empty(1), exact)
    far = 64 * exact
    buckets = [position_bucket(distance, tables) for distance in range(-far, far + 1)]
    return torch.tensor(buckets, device=device)
