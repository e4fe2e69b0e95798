"""Runs a function in several processes that share a gloo group."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from hpgr_plugin.components.sharded_table import RowShardedTable


def in_processes(count: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(*arguments)` in `count` processes; the first error is raised here."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    multiprocessing.start_processes(
        _work, args=(count, port, function, arguments), nprocs=count, start_method="spawn"
    )


def _work(
    rank: int, count: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    where = f"tcp://localhost:{port}"
    dist.init_process_group("gloo", rank=rank, world_size=count, init_method=where)
    function(*arguments)
    dist.barrier()  # gloo's threads must not outlive the tensors of the last collective
    dist.destroy_process_group()


@torch.no_grad()
def load_rows(sharded: RowShardedTable, table: Tensor) -> None:
    """Copy this process's rows of a whole table `[V, D]`."""
    sharded.weight.copy_(table[sharded.first_row :][: len(sharded.weight)])
