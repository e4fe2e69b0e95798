"""The host's train_fn without a GPU, where the host has no seam for it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from generative_recommenders.research.trainer import train as host_train
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


@contextlib.contextmanager
def ranks_are_the_cpu() -> Iterator[None]:
    """Inside, a device given as a number is the CPU, and the host's process group is gloo.

    train_fn says `device = rank` and passes that number on; nothing else in it needs a GPU.
    """
    setup, ddp, module_to = host_train.setup, host_train.DDP, torch.nn.Module.to

    def to(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        return module_to(self, *map(_device, args), **kwargs)

    host_train.setup = _setup_gloo
    host_train.DDP = _ddp_on_cpu
    torch.nn.Module.to = to  # type: ignore[method-assign, assignment]
    try:
        with _NumbersAreTheCpu():
            yield
    finally:
        host_train.setup, host_train.DDP = setup, ddp
        torch.nn.Module.to = module_to  # type: ignore[method-assign]


class _NumbersAreTheCpu(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to:
            args = (args[0], *map(_device, args[1:2]), *args[2:])
        if "device" in kwargs:
            kwargs["device"] = _device(kwargs["device"])
        return func(*args, **kwargs)


def _device(value: Any) -> Any:
    return _CPU if isinstance(value, int) and not isinstance(value, bool) else value


def _setup_gloo(rank: int, world_size: int, master_port: int) -> None:
    os.environ["MASTER_ADDR"] = "localhost"
    os.environ["MASTER_PORT"] = str(master_port)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)


def _ddp_on_cpu(module: torch.nn.Module, device_ids: Any = None, **kwargs: Any) -> Any:
    return DistributedDataParallel(module, **kwargs)
