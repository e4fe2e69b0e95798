"""Starts the host's ranking trainer with any .gin file, on CPU (gloo) or CUDA (NCCL)."""

import contextlib
import functools
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import torch
from generative_recommenders.common import HammerKernel
from generative_recommenders.dlrm_v3.train import utils as train

from hpgr_plugin.hosts.dlrm_v3.attach import attach
from hpgr_plugin.hosts.dlrm_v3.checkpoint import load_checkpoint
from hpgr_plugin.hosts.dlrm_v3.progress import LossLogger
from hpgr_plugin.hosts.launch import (
    CONFIGURATION_ERRORS,
    USER_ERRORS,
    Configuration,
    argument_parser,
    one_line_errors,
    read_config,
    start_gloo,
    start_workers,
)
from hpgr_plugin.hosts.seams import host_has_seam, replaced

MODES = ("train", "eval", "train-eval", "streaming-train-eval")
# Batches over which the host averages its window metrics, as in its own entry points.
_WINDOW = {"eval": 1000}
_DEFAULT_WINDOW = 2500


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run one process per device."""
    parser = argument_parser("hpgr_plugin.hosts.dlrm_v3", __doc__)
    parser.add_argument("--mode", choices=MODES, default="train-eval")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None, help="default: a GPU")
    parser.add_argument("--world_size", type=int, default=int(os.environ.get("WORLD_SIZE", "1")))
    parser.add_argument(
        "--fresh_slots",
        action="store_true",
        help="restore a checkpoint of the host's own model; slots keep their initial values",
    )
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and options.world_size > torch.cuda.device_count():
        parser.error(
            f"--world_size: {options.world_size} processes for {torch.cuda.device_count()} GPUs"
        )
    start_workers(
        run_worker,
        options.world_size,
        _free_port(),
        device,
        Configuration.of(options),
        options.mode,
        options.fresh_slots,
    )


def run_worker(
    rank: int,
    world_size: int,
    master_port: int,
    device_type: str,
    configuration: Configuration,
    mode: str,
    fresh_slots: bool,
) -> None:
    """One process of the host's trainer."""
    device = torch.device("cuda", rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        train.setup(rank=rank, world_size=world_size, master_port=master_port, device=device)
    else:
        start_gloo(rank, world_size, master_port)
    try:
        with one_line_errors(CONFIGURATION_ERRORS):
            read_config(configuration, attach)
            run = _prepare(mode, rank, world_size, device, fresh_slots)
        with one_line_errors(USER_ERRORS):
            run()
    finally:
        train.cleanup()


def _prepare(
    mode: str, rank: int, world_size: int, device: torch.device, fresh_slots: bool
) -> Callable[[], None]:
    """The host's training or evaluation loop of `mode`, ready to be called."""
    model, config, tables = train.make_model()
    if device.type == "cpu":
        model.set_hammer_kernel(HammerKernel.PYTORCH)
    with topology_of(device):
        model, optimizer = train.make_optimizer_and_shard(
            model=model, device=device, world_size=world_size
        )
    train_batches, test_batches = train.make_train_test_dataloaders(
        hstu_config=config, embedding_table_configs=tables
    )
    metrics = LossLogger(
        multitask_configs=config.multitask_configs,
        batch_size=train_batches.batch_size,
        window_size=_WINDOW.get(mode, _DEFAULT_WINDOW),
        device=device,
        rank=rank,
    )
    load_checkpoint(model, optimizer, metrics, device, fresh_slots=fresh_slots)
    loop, arguments = {
        "train": (train.train_loop, {"dataloader": train_batches, "optimizer": optimizer}),
        "eval": (train.eval_loop, {"dataloader": test_batches}),
        "train-eval": (
            train.train_eval_loop,
            {
                "train_dataloader": train_batches,
                "eval_dataloader": test_batches,
                "optimizer": optimizer,
            },
        ),
        "streaming-train-eval": (
            train.streaming_train_eval_loop,
            {
                "optimizer": optimizer,
                "hstu_config": config,
                "embedding_table_configs": tables,
            },
        ),
    }[mode]
    return functools.partial(
        loop, rank=rank, model=model, metric_logger=metrics, device=device, **arguments
    )


@contextlib.contextmanager
def topology_of(device: torch.device) -> Iterator[None]:
    """Inside, the host plans its shards for `device`; by itself it plans them for CUDA."""
    if device.type == "cuda" or host_has_seam("ranking_cpu"):
        yield
        return
    topology: Any = train.Topology

    @functools.wraps(topology)
    def of_this_device(*args: Any, **kwargs: Any) -> Any:
        return topology(*args, **{**kwargs, "compute_device": device.type})

    with replaced(train, Topology=of_this_device):
        yield


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])
