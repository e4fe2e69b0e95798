"""The launcher: the host's own loops from a .gin file outside the host, on CPU with gloo."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gin
import pytest
import torch
from generative_recommenders.dlrm_v3.train import utils as train

from hpgr_plugin.hosts import dlrm_v3
from hpgr_plugin.hosts.seams import host_has_seam

pytestmark = pytest.mark.upstream

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "upstream" / "ranking_synthetic.gin"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    script = ROOT / "examples" / "upstream" / "ranking_data.py"
    spec = importlib.util.spec_from_file_location("ranking_data", script)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write_data(tmp_path / "tmp", num_users=80)
    return tmp_path


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_module(folder, "hpgr_plugin.hosts.dlrm_v3", *arguments, "--device=cpu")


def run_module(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), *(p for p in sys.path if p)])
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


SHORT = (
    "--gin_bindings=train_eval_loop.num_train_batches = 3",
    "--gin_bindings=train_eval_loop.eval_frequency = 3",
    "--gin_bindings=train_eval_loop.num_eval_batches = 1",
)


def test_the_example_trains_and_evaluates(data: Path) -> None:
    done = launch(data, f"--gin_config_file={CONFIG}", "--mode=train-eval", *SHORT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "metric/lifetime_gauc/rating" in done.stdout
    # The host logs through INFO, which importing fbgemm would have switched off.
    assert "eval - Step 1 metrics" in done.stderr


@pytest.mark.skipif(
    not (host_has_seam("gin_file") and host_has_seam("ranking_cpu")) or torch.cuda.is_available(),
    reason="train_ranker takes a .gin file and a CPU only with the project's patches",
)
def test_the_hosts_own_entry_point_reads_the_slots(data: Path) -> None:
    def train_ranker(config: str) -> subprocess.CompletedProcess[str]:
        (data / "run.gin").write_text(f'include "{CONFIG}"\n{config}\n')
        name = "generative_recommenders.dlrm_v3.train.train_ranker"
        return run_module(data, name, "--gin_file=run.gin", "--mode=train-eval")

    short = "\n".join(binding.partition("=")[2] for binding in SHORT)
    done = train_ranker(short)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "metric/lifetime_gauc/rating" in done.stdout
    done = train_ranker("hpgr.SessionEnhancementModule.embedding_dim = 8")
    assert done.returncode != 0
    assert "sem must have the width of the item table" in done.stderr


@pytest.mark.parametrize("name", ["ranking_synthetic", "ranking_ml-1m"])
def test_the_configurations_build_their_models(name: str) -> None:
    dlrm_v3.attach()
    gin.parse_config_files_and_bindings(
        [str(CONFIG.with_name(f"{name}.gin"))], ["DATA = 'somewhere'"], finalize_config=False
    )
    model, config, tables = train.make_model()
    assert isinstance(model, dlrm_v3.DlrmHSTU)
    assert model.attention_hook.layout == "per_candidate"
    assert model.sem.embedding_dim == config.hstu_embedding_table_dim
    assert {table.embedding_dim for table in tables.values()} == {model.sem.embedding_dim}


def test_required_data_is_asked_for() -> None:
    config = str(CONFIG.with_name("ranking_ml-1m.gin"))
    gin.parse_config_files_and_bindings([config], [], finalize_config=False)
    with pytest.raises(RuntimeError, match="new_path_prefix"):
        train.make_train_test_dataloaders(hstu_config=None, embedding_table_configs={})


@pytest.mark.slow
def test_two_processes_train_together_with_stochastic_length(data: Path) -> None:
    done = launch(
        data,
        f"--gin_config_file={CONFIG}",
        "--mode=train-eval",
        "--world_size=2",
        *SHORT,
        "--gin_bindings=make_train_test_dataloaders.batch_size = 8",
        "--gin_bindings=hpgr.DlrmHSTU.attention_hook = @hpgr.StochasticLength()",
        "--gin_bindings=hpgr.StochasticLength.alpha = 1.5",
        "--allow_unused=PreferenceGuidedSparseAttention",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "metric/lifetime_gauc/rating" in done.stdout


def test_a_missing_config_and_an_unknown_mode_are_said_at_once(tmp_path: Path) -> None:
    done = launch(tmp_path, "--gin_config_file=nowhere.gin")
    assert done.returncode == 2
    assert "no file nowhere.gin" in done.stderr
    done = launch(tmp_path, f"--gin_config_file={CONFIG}", "--mode=guess")
    assert done.returncode == 2
    assert "guess" in done.stderr
