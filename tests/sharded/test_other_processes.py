"""A stage 1 that another number of processes continues, and what several processes log."""

import math
from pathlib import Path
from typing import Any

import gin
import pytest
import torch
import torch.distributed as dist
from several_processes import in_processes
from small_task import SMALL, config_files
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hpgr_plugin.cli import load_configs
from hpgr_plugin.config.registry import build
from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.hosts.embedded.train import trainer
from hpgr_plugin.hosts.embedded.train.distributed import Process
from hpgr_plugin.hosts.embedded.train.stages import pretrain
from hpgr_plugin.hosts.embedded.train.trainer import TrainingRun


def train(folder: str, epochs: int, resume: bool = False) -> dict[str, Any]:
    """A stage 1 with a sharded table, and its metrics."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    process = Process(rank, world, torch.device("cpu"))
    trainer.LOG_EVERY = 1
    gin.clear_config()
    settings = [
        "hpgr.MaskedItemModel.tables = 'rows'",
        f"hpgr.PretrainSettings.epochs = {epochs}",
        "hpgr.PretrainSettings.patience = 100",
    ]
    load_configs(config_files(), [*SMALL, *settings])
    task = Task(build("prepare_data"), build("RequestSettings"), process)
    run = TrainingRun(0, Path(folder), process, resume=resume)
    with gin.config_scope("mim"):
        metrics = pretrain(task, build("PretrainSettings"), run).metrics
    return {**metrics, "items": task.data.log.num_items}


def test_one_process_continues_the_schedule_of_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps, which the learning rate follows, are those of the processes that go on."""
    monkeypatch.setattr(trainer, "LOG_EVERY", 1)
    in_processes(2, train, str(tmp_path / "two"), 1)
    shown = EventAccumulator(str(tmp_path / "two" / "tb"))
    shown.Reload()
    begun = shown.Scalars("train/loss")
    continued = train(str(tmp_path / "two"), 2, resume=True)
    whole = train(str(tmp_path / "whole"), 2)
    assert len(begun) < whole["steps"] / 2
    assert continued["steps"] == whole["steps"]
    # Of both processes together: at the start all items are as likely.
    assert begun[0].value == pytest.approx(math.log(whole["items"]), rel=0.1)
    gin.clear_config()
