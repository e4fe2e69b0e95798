"""Small trained models of every kind of row, and their test requests in the log's own ids."""

from collections.abc import Callable
from pathlib import Path

import pytest
from small_task import ONE_PROCESS, config_files, configure

from hpgr_plugin.config.registry import build
from hpgr_plugin.config.scopes import config_scope
from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.hosts.embedded.train.stages import finetune
from hpgr_plugin.hosts.embedded.train.trainer import TrainingRun
from hpgr_plugin.serving.export import export_checkpoint

__all__ = ["configure"]

SMALL = [
    "NUM_USERS = 30",
    "EMBEDDING_DIM = 16",
    "MAX_HISTORY = 60",
    "hpgr.RequestLoader.batch_tokens = 512",
    "hpgr.FinetuneSettings.epochs = 1",
    "hpgr.FinetuneSettings.warmup_steps = 5",
]
FILES = config_files("models/hpgr_rows", "models/rivals")


@pytest.fixture
def small_run() -> tuple[list[str], list[str]]:
    """The files and bindings that `configure` reads."""
    return FILES, SMALL


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
