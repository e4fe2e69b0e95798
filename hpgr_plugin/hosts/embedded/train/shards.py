"""What a training does differently where the item table is divided among the processes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hpgr_plugin.components.sharded_table import RowShardedTable
from hpgr_plugin.ops.collectives import sum_over_processes

_ROWS_PER_BLOCK = 1 << 16


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
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(tables))
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
