"""Starts the host's ranking trainer with any .gin file, on CPU (gloo) or CUDA (NCCL)."""

import argparse
import contextlib
import functools
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gin
import torch
from generative_recommenders.common import HammerKernel
from generative_recommenders.dlrm_v3.checkpoint import load_dmp_checkpoint
from generative_recommenders.dlrm_v3.train import utils as train
from generative_recommenders.dlrm_v3.utils import MetricsLogger
from torch import distributed as dist
from torch import multiprocessing

from hpgr_plugin.hosts.dlrm_v3.attach import attach
from hpgr_plugin.hosts.seams import host_has_seam

MODES = ("train", "eval", "train-eval", "streaming-train-eval")
_WINDOW = {"eval": 1000}
_DEFAULT_WINDOW = 2500


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run one process per device."""
    parser = argparse.ArgumentParser(
        prog="python -m hpgr_plugin.hosts.dlrm_v3", description=__doc__
    )
    parser.add_argument("--gin_config_file", required=True, type=Path)
    parser.add_argument("--gin_bindings", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--mode", choices=MODES, default="train-eval")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None, help="default: a GPU")
    parser.add_argument("--world_size", type=int, default=int(os.environ.get("WORLD_SIZE", "1")))
    options = parser.parse_args(arguments)
    if not options.gin_config_file.is_file():
        parser.error(f"--gin_config_file: no file {options.gin_config_file}")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and options.world_size > torch.cuda.device_count():
        parser.error(
            f"--world_size: {options.world_size} processes for {torch.cuda.device_count()} GPUs"
        )
    config = str(options.gin_config_file.resolve())
    settings = (options.world_size, _free_port(), device, config, options.gin_bindings)
    multiprocessing.start_processes(
        run_worker,
        args=(*settings, options.mode),
        nprocs=options.world_size,
        join=True,
        start_method="spawn",
    )


def run_worker(
    rank: int,
    world_size: int,
    master_port: int,
    device_type: str,
    gin_config_file: str,
    gin_bindings: list[str],
    mode: str,
) -> None:
    """One process of the host's trainer."""
    # Importing fbgemm has set the root logger to WARNING, which hides the host's metrics.
    logging.basicConfig(level=logging.INFO, force=True)
    device = torch.device("cuda", rank) if device_type == "cuda" else torch.device("cpu")
    _start_process_group(rank, world_size, master_port, device)
    try:
        gin.parse_config_files_and_bindings([gin_config_file], gin_bindings)
        attach()
        _run(mode, rank, world_size, device)
    finally:
        train.cleanup()


def _run(mode: str, rank: int, world_size: int, device: torch.device) -> None:
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
    metrics = MetricsLogger(
        multitask_configs=config.multitask_configs,
        batch_size=train_batches.batch_size,
        window_size=_WINDOW.get(mode, _DEFAULT_WINDOW),
        device=device,
        rank=rank,
    )
    load_dmp_checkpoint(model=model, optimizer=optimizer, metric_logger=metrics, device=device)
    common: dict[str, Any] = {
        "rank": rank,
        "model": model,
        "metric_logger": metrics,
        "device": device,
    }
    if mode == "train":
        train.train_loop(**common, dataloader=train_batches, optimizer=optimizer)
    elif mode == "eval":
        train.eval_loop(**common, dataloader=test_batches)
    elif mode == "train-eval":
        train.train_eval_loop(
            **common,
            train_dataloader=train_batches,
            eval_dataloader=test_batches,
            optimizer=optimizer,
        )
    else:
        train.streaming_train_eval_loop(
            **common, optimizer=optimizer, hstu_config=config, embedding_table_configs=tables
        )


def _start_process_group(
    rank: int, world_size: int, master_port: int, device: torch.device
) -> None:
    if device.type == "cuda":
        train.setup(rank=rank, world_size=world_size, master_port=master_port, device=device)
        return
    os.environ["MASTER_ADDR"] = "localhost"
    os.environ["MASTER_PORT"] = str(master_port)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)


@contextlib.contextmanager
def topology_of(device: torch.device) -> Iterator[None]:
    """The host plans its shards for CUDA whatever the device; inside, for this one."""
    if device.type == "cuda" or host_has_seam("ranking_cpu"):
        yield
        return
    topology = train.Topology

    @functools.wraps(topology)
    def of_this_device(*args: Any, **kwargs: Any) -> Any:
        return topology(*args, **{**kwargs, "compute_device": device.type})

    train.Topology = of_this_device
    try:
        yield
    finally:
        train.Topology = topology


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])
