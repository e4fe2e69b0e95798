"""The relative bias of the layers for given distances, apart from an attention's specification."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpgr_plugin.hosts.embedded.model.encoder import SequenceEncoder
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


@dataclass(frozen=True, eq=False)
class LayerBias:
    """The biases of all layers by places in their joint tables; weights of a served model stay.

    Attributes:
        joint: `[layers, P * T]`.
        tables: the same, layer by layer.
        itself: `[layers]`, a token's bias to itself.
        own: place of no distance.
        sizes: of the tables, on the host: `bias_places` takes it for places made there.
    """

    joint: Tensor
    tables: tuple[Tensor, ...]
    itself: Tensor
    own: int
    sizes: PositionTimeBias

    @classmethod
    @torch.no_grad()
    def of(cls, encoder: SequenceEncoder) -> LayerBias | None:
        """Of a trained encoder; None where it has no bias."""
        if encoder.bias is None:
            return None
        tables = [encoder.bias(depth) for depth in range(len(encoder.layers))]
        joint = torch.stack([joint_table(table) for table in tables])
        zero = torch.zeros((), dtype=torch.int64)
        position, time, exact = tables[0]
        sizes = PositionTimeBias(torch.empty(len(position)), torch.empty(len(time)), exact)
        own = int(bias_places(zero, zero, sizes))
        return cls(joint, joint.unbind(0), joint[:, own], own, sizes)

    @property
    def num_times(self) -> int:
        """T."""
        return len(self.sizes.time_table)

    def at(self, places: Tensor) -> Tensor:
        """The bias of every layer at places `[N]`, `[layers, N]`."""
        return self.joint.index_select(1, places)
