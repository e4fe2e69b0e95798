"""The slate stages on the synthetic log, configured as users configure theirs."""

from collections.abc import Callable
from pathlib import Path

import pytest
from small_task import config_files

FILES = config_files("models/slates")
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


@pytest.fixture
def small_run() -> tuple[list[str], list[str]]:
    """The files and bindings that `configure` reads."""
    return FILES, SMALL


@pytest.fixture
def run_file(tmp_path: Path) -> Callable[..., Path]:
    """`run_file("binding", ...)`: a gin file of the small run."""

    def write(*bindings: str) -> Path:
        path = tmp_path / "run.gin"
        path.write_text("\n".join([*(f"include '{name}'" for name in FILES), *SMALL, *bindings]))
        return path

    return write
