"""The process group: one process, or those of `torchrun` (gloo on CPU, NCCL on CUDA)."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Process:
    """This process among its peers.

    Attributes:
        rank: 0 to world_size - 1.
        world_size: number of processes.
        device: of this process.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def process_group() -> Iterator[Process]:
    """Join the group that `torchrun` describes in the environment, or run as one process."""
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Process(0, 1, device)
        return
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Process(dist.get_rank(), dist.get_world_size(), device)
        # gloo's threads outlive the group where DDP was used. One that still releases tensors of
        # the last collective when the interpreter ends aborts the process: let it finish first.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def gather_arrays(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Each array concatenated over the processes, in the order of their ranks, on all of them."""
    if not dist.is_initialized():
        return arrays
    return [np.concatenate(parts) for parts in zip(*gather_objects(arrays), strict=True)]


def gather_objects(value: Any) -> list[Any]:
    """The value of every process, in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast(value: Any) -> Any:
    """The value of the first process."""
    return gather_objects(value)[0]


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()
