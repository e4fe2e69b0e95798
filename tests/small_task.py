"""Fixtures of a small run on the synthetic log, configured as users configure theirs.

A `conftest.py` imports them and defines the fixture `small_run`: its config files and bindings.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gin
import pytest
import torch

from hpgr_plugin.cli import load_configs
from hpgr_plugin.config.registry import build
from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.hosts.embedded.train.distributed import Process
from hpgr_plugin.hosts.embedded.train.trainer import Trainer, TrainingRun

COSTS = ("seconds_per_step", "inference_seconds_per_step", "examples_per_second")
ONE_PROCESS = Process(rank=0, world_size=1, device=torch.device("cpu"))
# Sizes and settings of two short stages.
SMALL = [
    "NUM_USERS = 40",
    "EMBEDDING_DIM = 16",
    "MAX_HISTORY = 60",
    "hpgr.RequestLoader.batch_tokens = 512",
    "hpgr.SequenceLoader.batch_tokens = 512",
    "hpgr.PretrainSettings.epochs = 2",
    "hpgr.FinetuneSettings.epochs = 3",
    "hpgr.FinetuneSettings.patience = 3",
    "hpgr.FinetuneSettings.warmup_steps = 5",
]


@pytest.fixture
def configure(small_run: tuple[Sequence[str], Sequence[str]]) -> Iterator[Callable[..., Task]]:
    """`configure("binding", ...)`: the small run with these bindings over it, and its task."""
    files, small = small_run

    def apply(*bindings: str) -> Task:
        gin.clear_config()
        load_configs(list(files), [*small, *bindings])
        return Task(build("prepare_data"), build("RequestSettings"), ONE_PROCESS)

    yield apply
    gin.clear_config()


@pytest.fixture
def training(tmp_path: Path) -> Callable[..., TrainingRun]:
    """`training("folder")`: a training that writes there, by default with seed 0."""

    def make(folder: str = "run", *, seed: int = 0, **changes: Any) -> TrainingRun:
        return TrainingRun(seed, tmp_path / folder, ONE_PROCESS, **changes)

    return make


@contextmanager
def killed_at(number: int) -> Iterator[None]:
    """A training inside of it is interrupted before its step of this number, counted from 0."""
    step = Trainer._step

    def killed(self: Trainer, *args: object) -> torch.Tensor:
        if self.progress.step == number:
            raise KeyboardInterrupt
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            yield


def without_costs(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a run without how long it took."""
    return {key: value for key, value in metrics.items() if key not in COSTS}


def config_files(*names: str) -> list[str]:
    """The project's config files of these names."""
    return [f"configs/{name}.gin" for name in ("data/synthetic", "models/hpgr_base", *names)]
