"""A small two-stage run on the synthetic log, configured as users configure theirs."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import gin
import pytest
import torch

from hpgr_plugin.cli import load_configs
from hpgr_plugin.hosts.embedded.train.distributed import Process

CONFIGS = Path(__file__).parents[3] / "configs"
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
FILES = ["data/synthetic.gin", "models/hpgr_base.gin", "models/hpgr_rows.gin"]


@pytest.fixture
def configure() -> Iterator[Callable[..., None]]:
    """`configure("binding", ...)`: the small run with these bindings over it."""

    def apply(*bindings: str) -> None:
        gin.clear_config()
        load_configs([str(CONFIGS / name) for name in FILES], [*SMALL, *bindings])

    yield apply
    gin.clear_config()


@pytest.fixture
def alone() -> Process:
    """One process on the CPU."""
    return Process(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture
def command_line() -> Callable[[Path, Sequence[str]], list[str]]:
    """`command_line(output_dir, bindings)`: the flags of the same run for an entry point."""

    def build(output_dir: Path, bindings: Sequence[str] = ()) -> list[str]:
        run_file = output_dir / "run.gin"
        output_dir.mkdir(parents=True, exist_ok=True)
        run_file.write_text("\n".join(f"include '{CONFIGS / name}'" for name in FILES))
        output = f"hpgr.run.output_dir = '{output_dir}'"
        flags = [f"--gin_bindings={line}" for line in [*SMALL, output, *bindings]]
        return [f"--gin_config_file={run_file}", *flags]

    return build
