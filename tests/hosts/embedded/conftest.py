"""A small two-stage run on the synthetic log, configured as users configure theirs."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gin
import pytest
import torch

from hpgr_plugin.cli import load_configs
from hpgr_plugin.config.registry import build
from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.hosts.embedded.train.distributed import Process
from hpgr_plugin.hosts.embedded.train.trainer import TrainingRun

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
FILES = [
    f"configs/{name}.gin" for name in ("data/synthetic", "models/hpgr_base", "models/hpgr_rows")
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
def training(tmp_path: Path) -> Callable[..., TrainingRun]:
    """`training("folder")`: a training that writes there, by default with seed 0."""

    def make(folder: str = "run", *, seed: int = 0, **changes: Any) -> TrainingRun:
        return TrainingRun(seed, tmp_path / folder, ONE_PROCESS, **changes)

    return make


@pytest.fixture
def command_line() -> Callable[[Path, Sequence[str]], list[str]]:
    """`command_line(output_dir, bindings)`: the flags of the same run for an entry point."""

    def build_flags(output_dir: Path, bindings: Sequence[str] = ()) -> list[str]:
        run_file = output_dir / "run.gin"
        output_dir.mkdir(parents=True, exist_ok=True)
        run_file.write_text("\n".join(f"include '{name}'" for name in FILES))
        output = f"hpgr.run.output_dir = '{output_dir}'"
        flags = [f"--gin_bindings={line}" for line in [*SMALL, output, *bindings]]
        return [f"--gin_config_file={run_file}", *flags]

    return build_flags
