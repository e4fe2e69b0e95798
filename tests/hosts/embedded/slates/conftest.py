"""The slate stages on the synthetic log, configured as users configure theirs."""

from collections.abc import Callable, Iterator
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

FILES = [f"configs/{name}.gin" for name in ("data/synthetic", "models/hpgr_base", "models/slates")]
SMALL = [
    "NUM_USERS = 40",
    "EMBEDDING_DIM = 16",
    "MAX_HISTORY = 60",
    "CODEBOOK_SIZE = 8",
    "hpgr.prepare_data.split = @hpgr.LastNSplit()",
    "hpgr.LastNSplit.test = 5",
    "hpgr.LastNSplit.validation = 5",
    "hpgr.RequestLoader.batch_tokens = 1024",
    "hpgr.SequenceLoader.batch_tokens = 1024",
    "hpgr.PretrainSettings.epochs = 1",
    "hpgr.TokenizeSettings.epochs = 4",
    "hpgr.TokenizeSettings.passes = 1",
    "hpgr.TokenizeSettings.autoencoder_passes = 5",
    "hpgr.SlateSettings.epochs = 2",
    "hpgr.AlignSettings.epochs = 2",
    "hpgr.HierarchicalDecoder.planner_layers = 1",
    "hpgr.run.allow_unused = ['SessionEnhancementModule', 'TimeAwarePositionalEncoder', "
    "'LastFractionSplit', 'RQVAE', 'CRQVAE', 'ResidualKMeans', 'HierarchicalDecoder', "
    "'FlatItemDecoder', 'FlatSlateDecoder']",
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
def run_file(tmp_path: Path) -> Callable[..., Path]:
    """`run_file("binding", ...)`: a gin file of the small run."""

    def write(*bindings: str) -> Path:
        path = tmp_path / "run.gin"
        path.write_text("\n".join([*(f"include '{name}'" for name in FILES), *SMALL, *bindings]))
        return path

    return write
