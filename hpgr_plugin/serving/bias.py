"""The relative bias of the layers for given distances, apart from an attention's specification."""

from __future__ import annotations

from torch import Tensor

from hpgr_plugin.ops.hstu_attention import PositionTimeBias
from hpgr_plugin.ops.hstu_attention.buckets import buckets_by_distance, time_buckets


def position_time_bias(
    distance: Tensor, seconds: Tensor, tables: PositionTimeBias, buckets: Tensor | None = None
) -> Tensor:
    """`position_table[bucket(distance)] + time_table[log2(1 + seconds)]`, in the shape of both.

    Args:
        distance: int64, a query's position minus a key's.
        seconds: int64, absolute difference of their times.
        tables: of one layer.
        buckets: of `buckets_by_distance`; None looks them up.
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
        buckets = buckets_by_distance(tables, distance.device)
    far = len(buckets) // 2
    position = buckets[distance.clamp(-far, far) + far]
    size = len(tables.time_table)
    return position * size + time_buckets(seconds, size)
