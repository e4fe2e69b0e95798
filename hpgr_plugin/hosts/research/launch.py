"""Starts the host's retrieval trainer, or stage 1 over its data sets, on CPU (gloo) or CUDA.

With a GPU `--mode=train` does what the host's own main.py does; without one it trains on the CPU,
whether or not the host can do that by itself.
"""

# Not in `__main__`, because spawned workers import their function from a module.

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from generative_recommenders.research.trainer import train
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from hpgr_plugin.config.registry import build
from hpgr_plugin.hosts import launch
from hpgr_plugin.hosts.research.attach import attach
from hpgr_plugin.hosts.seams import host_has_seam, replaced

_CPU = torch.device("cpu")


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run the mode."""
    parser = launch.argument_parser("hpgr_plugin.hosts.research", __doc__)
    parser.add_argument("--mode", choices=("train", "pretrain"), default="train")
    parser.add_argument("--master_port", type=int, default=12355)
    options = parser.parse_args(arguments)
    configuration = launch.Configuration.of(options)
    if options.mode == "pretrain":
        with launch.one_line_errors(launch.CONFIGURATION_ERRORS):
            launch.read_config(configuration, attach)
        with launch.one_line_errors(launch.USER_ERRORS):
            build("research_pretrain")
        return
    launch.start_workers(
        train_worker, max(1, torch.cuda.device_count()), options.master_port, configuration
    )


def train_worker(
    rank: int, world_size: int, master_port: int, configuration: launch.Configuration
) -> None:
    """One process of the host's `train_fn`."""
    with launch.one_line_errors(launch.CONFIGURATION_ERRORS):
        launch.read_config(configuration, attach)
    without_gpu = not torch.cuda.is_available() and not host_has_seam("research_cpu")
    with (
        launch.one_line_errors(launch.USER_ERRORS),
        ranks_are_the_cpu() if without_gpu else contextlib.nullcontext(),
    ):
        train.train_fn(rank, world_size, master_port)


@contextlib.contextmanager
def ranks_are_the_cpu() -> Iterator[None]:
    """Inside, a device given as a number is the CPU, and the host's process group is gloo.

    `train_fn` uses its rank as the device; nothing else in it needs a GPU.
    """
    with replaced(train, setup=launch.start_gloo, DDP=_ddp_on_cpu), _NumbersAreTheCpu():
        yield


class _NumbersAreTheCpu(TorchFunctionMode):
    """Inside, torch functions that get a number as their device get the CPU instead."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to or func is torch._C._nn._parse_to:  # the latter: Module.to
            args = tuple(map(_device, args))
        if "device" in kwargs:
            kwargs["device"] = _device(kwargs["device"])
        return func(*args, **kwargs)


def _device(value: Any) -> Any:
    return _CPU if isinstance(value, int) and not isinstance(value, bool) else value


def _ddp_on_cpu(module: torch.nn.Module, device_ids: Any = None, **kwargs: Any) -> Any:
    return DistributedDataParallel(module, **kwargs)
