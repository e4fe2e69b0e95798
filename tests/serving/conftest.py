"""Small trained models of every kind of row, and their test requests in the log's own ids."""

from collections.abc import Callable, Iterator
from pathlib import Path

import gin
import pytest
import torch

from hpgr_plugin.cli import load_configs
from hpgr_plugin.config.registry import build
from hpgr_plugin.config.scopes import config_scope
from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.hosts.embedded.train.distributed import Process
from hpgr_plugin.hosts.embedded.train.stages import finetune
from hpgr_plugin.hosts.embedded.train.trainer import TrainingRun
from hpgr_plugin.serving.export import export_checkpoint

SMALL = [
    "NUM_USERS = 30",
    "EMBEDDING_DIM = 16",
    "MAX_HISTORY = 60",
    "hpgr.RequestLoader.batch_tokens = 512",
    "hpgr.FinetuneSettings.epochs = 1",
    "hpgr.FinetuneSettings.warmup_steps = 5",
]
FILES = [
    f"configs/{name}.gin"
    for name in ("data/synthetic", "models/hpgr_base", "models/hpgr_rows", "models/rivals")
]
ONE_PROCESS = Process(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture
def configure() -> Iterator[Callable[..., Task]]:
    """`configure("binding", ...)`: the small run with these bindings over it, and its task."""

    def apply(*bindings: str) -> Task:
        gin.clear_config()
        load_configs(FILES, [*SMALL, *bindings])
        return Task(build("prepare_data"), build("RequestSettings"), ONE_PROCESS)

    yield apply
    gin.clear_config()


@pytest.fixture
def trained(configure: Callable[..., Task], tmp_path: Path) -> Callable[..., tuple[Task, Path]]:
    """`trained(row, "binding", ...)`: train the row, export it; its task and the folder."""

    def make(row: str, *bindings: str) -> tuple[Task, Path]:
        task = configure(*bindings)
        folder = tmp_path / f"served_{row}"
        with config_scope(row):
            finetune(task, build("FinetuneSettings"), TrainingRun(0, tmp_path / row, ONE_PROCESS))
            export_checkpoint(tmp_path / row / "checkpoint.pt", folder, task, scope=row)
        return task, folder

    return make
