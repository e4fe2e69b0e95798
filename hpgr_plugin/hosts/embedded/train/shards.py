"""What a training does differently where the item table is divided among the processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hpgr_plugin.components.sharded_table import RowShardedTable
from hpgr_plugin.data.batches import Loader
from hpgr_plugin.ops.collectives import largest_over_processes, sum_over_processes, world_size

_ROWS_PER_BLOCK = 1 << 16
_Item = TypeVar("_Item")
_Prepared = TypeVar("_Prepared")


def sharded_tables(model: nn.Module) -> dict[str, RowShardedTable]:
    """The sharded tables of a model by the name of their weight."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, RowShardedTable)
    }


def data_parallel(model: nn.Module) -> DistributedDataParallel:
    """The model under DDP, which does not touch sharded tables."""
    if tables := sharded_tables(model):
        # Nor buffers, which no step changes: some have a number for every item.
        ignored = [*tables, *(name for name, _ in model.named_buffers())]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    # A batch without history leaves some weights without a gradient.
    return DistributedDataParallel(model, find_unused_parameters=True)


def clip_gradients(model: nn.Module, largest_norm: float) -> None:
    """Clip the norm of the gradient of all weights, the shards of all processes included."""
    tables = sharded_tables(model) if dist.is_initialized() else {}
    if not tables:
        nn.utils.clip_grad_norm_(model.parameters(), largest_norm)
        return
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    dense = nn.utils.get_total_norm([grad for name, grad in grads.items() if name not in tables])
    shards = nn.utils.get_total_norm([grad for name, grad in grads.items() if name in tables])
    device = next(iter(tables.values())).weight.device
    norm = (dense.to(device).square() + sum_over_processes(shards.to(device).square())).sqrt()
    nn.utils.clip_grads_with_norm_(model.parameters(), largest_norm, norm)


def batches_of_all(
    model: nn.Module,
    loader: Loader[_Item],
    prepare: Callable[[_Item, int], _Prepared],
    *,
    most: int | None = None,
) -> Iterator[_Prepared]:
    """The loader's first batches, prepared, for a model that looks up once for each of them.

    All processes look up at the same time, but one may have fewer batches than another: after its
    own, it looks up nothing until all are done. Every process takes all that this yields.

    Args:
        model: with a sharded table or without.
        loader: of this process.
        prepare: see `Loader.map_batches`.
        most: batches at most; None for all.
    """
    tables = sharded_tables(model).values() if world_size() > 1 else ()
    missing = 0
    if tables:
        own = loader.num_batches() if most is None else min(most, loader.num_batches())
        device = next(iter(tables)).weight.device
        missing = int(largest_over_processes(torch.tensor(own, device=device))) - own
    yield from islice(loader.map_batches(prepare), most)
    for _ in range(missing):
        for table in tables:
            table(torch.empty(0, dtype=torch.int64, device=device))


def gather_blocks(table: RowShardedTable) -> Iterator[Tensor]:
    """The table's rows in order, a block `[at most 65536, D]` on the CPU at a time.

    All processes iterate. The first one gets the rows, the others blocks without any.
    """
    weight = table.weight.detach()
    if not dist.is_initialized():
        yield from (block.cpu() for block in weight.split(_ROWS_PER_BLOCK))
        return
    here = dist.get_rank()
    for owner in range(dist.get_world_size()):
        first = min(table.num_embeddings, owner * table.rows_per_process)
        last = min(table.num_embeddings, first + table.rows_per_process)
        for start in range(first, last, _ROWS_PER_BLOCK):
            rows = slice(start - first, min(start + _ROWS_PER_BLOCK, last) - first)
            yield _move(weight, rows, owner, here)


def _move(weight: Tensor, rows: slice, owner: int, here: int) -> Tensor:
    """Rows of the owner's shard, on the first process."""
    if owner == here == 0:
        return weight[rows].cpu()
    if here == owner:
        dist.send(weight[rows].contiguous(), dst=0)
    elif here == 0:
        received = weight.new_empty((rows.stop - rows.start, weight.shape[1]))
        dist.recv(received, src=owner)
        return received.cpu()
    return torch.empty(0, weight.shape[1])
