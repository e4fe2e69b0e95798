"""The launcher behind `python -m hpgr_plugin.hosts.research`.

Not in `__main__`, because spawned workers have to import their function from a module.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys

import gin
import torch
from torch import multiprocessing as mp

from hpgr_plugin.hosts import research
from hpgr_plugin.hosts.research.cpu import ranks_are_the_cpu
from hpgr_plugin.hosts.seams import host_has_seam


def main(arguments: list[str] | None = None) -> None:
    """Parse the flags and run."""
    parser = argparse.ArgumentParser(prog="python -m hpgr_plugin.hosts.research")
    parser.add_argument("--gin_config_file", required=True)
    parser.add_argument("--mode", choices=("train", "pretrain"), default="train")
    parser.add_argument("--master_port", type=int, default=12355)
    options = parser.parse_args(arguments)
    if options.mode == "pretrain":
        _read(options.gin_config_file)
        research.pretrain()
        return
    world_size = max(1, torch.cuda.device_count())
    mp.start_processes(
        train_worker,
        args=(world_size, options.master_port, options.gin_config_file),
        nprocs=world_size,
        start_method="spawn",
    )


def train_worker(rank: int, world_size: int, master_port: int, gin_config_file: str) -> None:
    """One rank of the host's train_fn."""
    from generative_recommenders.research.trainer.train import train_fn

    _read(gin_config_file)
    without_gpu = not torch.cuda.is_available() and not host_has_seam("research_cpu")
    with ranks_are_the_cpu() if without_gpu else contextlib.nullcontext():
        train_fn(rank, world_size, master_port)


def _read(gin_config_file: str) -> None:
    gin.parse_config_file(gin_config_file)
    research.attach()
    # The host's metrics are INFO lines, and importing fbgemm has raised the level above them.
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, force=True)
