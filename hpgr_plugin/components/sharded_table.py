"""An item table whose rows are divided among the processes."""

from __future__ import annotations

import logging
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hpgr_plugin.log_once import log_once
from hpgr_plugin.ops.collectives import (
    exchange_counts,
    exchange_rows,
    rank,
    world_size,
)

LOG = logging.getLogger(__name__)

Tables = Literal["dense", "torchrec", "rows"]
# Initial rows are drawn in blocks of this many, so they do not depend on the number of processes.
_ROWS_PER_DRAW = 1 << 16


class RowShardedTable(nn.Module):
    """The rows `first_row` to `first_row + len(weight) - 1` of an embedding table of V rows.

    Every process has `ceil(V / W)` rows, the last ones what is left. Ids and rows travel by
    all-to-all. All processes look up at the same time, each its own ids.

    Args:
        num_embeddings: V.
        embedding_dim: D.
        std: of the initial rows; they do not depend on the number of processes.

    Attributes:
        weight: `[V_r, D]`, this process's rows. As under DDP, its gradient is the mean over
            processes of what each sends back.
        first_row: V or less; without rows of its own, a process has `first_row = V`.
    """

    def __init__(self, *, num_embeddings: int, embedding_dim: int, std: float) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.rows_per_process = -(-num_embeddings // world_size())
        self.first_row = min(num_embeddings, rank() * self.rows_per_process)
        last_row = min(num_embeddings, self.first_row + self.rows_per_process)
        shape = (last_row - self.first_row, embedding_dim)
        self.weight = self._empty_weight(shape)
        self._initialise(std)

    def forward(self, items: Tensor) -> Tensor:
        """The rows of this process's items.

        Args:
            items: int64 `[N]`, in `[0, V)`; N may be 0 and differ between processes.

        Returns:
            `[N, D]`.
        """
        if world_size() == 1:
            return F.embedding(items, self.weight)
        owner = items // self.rows_per_process
        order = owner.argsort(stable=True)
        counts = torch.bincount(owner, minlength=world_size())
        send, receive = torch.stack([counts, exchange_counts(counts)]).tolist()
        wanted = exchange_rows(items[order], send, receive) - self.first_row
        rows = exchange_rows(look_up(self.weight, wanted), receive, send)
        return torch.empty_like(rows).index_copy(0, order, _mean_gradient(rows))

    @torch.no_grad()
    def take_rows(self, first: int, rows: Tensor) -> None:
        """Copy those of some rows of the whole table that are this process's.

        Args:
            first: place of the first one in the whole table.
            rows: `[N, D]`, neighbours.
        """
        start = max(first, self.first_row)
        end = min(first + len(rows), self.first_row + len(self.weight))
        if start < end:
            here = slice(start - self.first_row, end - self.first_row)
            self.weight[here].copy_(rows[start - first : end - first])

    def _empty_weight(self, shape: tuple[int, int]) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, device=shard_device()))

    @torch.no_grad()
    def _initialise(self, std: float) -> None:
        (seed,) = _seed_of_all()
        end = self.first_row + len(self.weight)
        for start in range(0, self.num_embeddings, _ROWS_PER_DRAW):
            if start < end and start + _ROWS_PER_DRAW > self.first_row:
                block = torch.Generator(self.weight.device)
                block.manual_seed(seed + start // _ROWS_PER_DRAW)
                rows = self.weight.new_empty(_ROWS_PER_DRAW, self.embedding_dim)
                self.take_rows(start, rows.normal_(std=std, generator=block))


def build_sharded_table(
    tables: Tables, *, num_embeddings: int, embedding_dim: int, std: float
) -> RowShardedTable:
    """The table of `tables`, "torchrec" or "rows".

    Where torchrec, an operator of fbgemm that it needs or a process group is not here, "torchrec"
    becomes "rows", and one line of the log says why.
    """
    sizes = {"num_embeddings": num_embeddings, "embedding_dim": embedding_dim}
    if tables == "torchrec":
        from hpgr_plugin.components.torchrec_table import TorchrecTable, why_no_torchrec

        reason = why_no_torchrec(shard_device()) if dist.is_initialized() else "one process"
        if reason is None:
            return TorchrecTable(**sizes, std=std)
        if rank() == 0:
            message = f"tables = 'torchrec' cannot be had here, 'rows' is used: {reason}"
            log_once(LOG, message, logging.WARNING)
    return RowShardedTable(**sizes, std=std)


def shard_device() -> torch.device:
    """Where this process's rows are: its CUDA device under NCCL, else the CPU."""
    if dist.is_initialized() and "nccl" in dist.get_backend():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def look_up(weight: Tensor, rows: Tensor) -> Tensor:
    """`weight[rows]`; a shard without rows is asked for none, which `F.embedding` refuses."""
    return F.embedding(rows, weight) if len(weight) else weight[rows]


class _MeanGradient(torch.autograd.Function):
    @staticmethod
    def forward(_: object, rows: Tensor) -> Tensor:
        return rows.view_as(rows)

    @staticmethod
    def backward(_: object, grad: Tensor) -> Tensor:
        return grad / world_size()


def _mean_gradient(rows: Tensor) -> Tensor:
    """The rows; their gradient is divided by the number of processes."""
    same: Tensor = _MeanGradient.apply(rows)
    return same


def _seed_of_all() -> list[int]:
    """A seed from the first process's generator."""
    seed = [int(torch.randint(0, 2**40, ()))]
    if dist.is_initialized():
        dist.broadcast_object_list(seed)
    return seed
