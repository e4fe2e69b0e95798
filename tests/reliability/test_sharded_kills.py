"""A stage 1 with a sharded table, killed while it saves, goes on from the checkpoint before."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from small_run import ROOT, Count, results, run, write_config

from hpgr_plugin.hosts.embedded.train.run_directory import checkpoint_folders

pytestmark = pytest.mark.slow  # each starts two processes several times

BINDINGS = (
    "hpgr.MaskedItemModel.tables = 'rows'",
    "hpgr.PretrainSettings.epochs = 4",
    "hpgr.PretrainSettings.checkpoint_every = 1",
    "DROPOUT = 0.2",
)


def configure(folder: Path, *bindings: str) -> Path:
    folder.mkdir()
    return write_config(folder, *BINDINGS, *bindings, mode="pretrain")


def table(folder: Path) -> torch.Tensor:
    with safe_open(folder / "out" / "handoff.safetensors", framework="pt") as file:
        return file.get_tensor("item_table")


def kill_in_save(config: Path, tries: int = 10) -> None:
    """Kill both processes while a checkpoint is complete and the next one half-written."""
    out = config.parent / "out"

    def half_written() -> bool:
        names = os.listdir(out) if out.exists() else []
        saving = {name.endswith(".tmp") for name in names if name.startswith("checkpoint-")}
        return saving == {True, False}

    for _ in range(tries):
        processes = start_two(config)
        while processes[0].poll() is None and not half_written():
            pass
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
        if half_written():
            return
        shutil.rmtree(out)  # too late: the checkpoint was complete
    pytest.fail(f"no run was killed in a save in {tries} tries")


def start_two(config: Path) -> list[subprocess.Popen]:
    """What torchrun starts, without torchrun: its workers would outlive it."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "hpgr_plugin.main", f"--gin_config_file={config}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=config.parent,
            env={
                **os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank),
                "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
            },
        )
        for rank in range(2)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole_sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded") / "whole"
    code, errors = run(configure(folder), processes=2)
    assert code == 0, errors
    return folder


def test_killed_in_an_asynchronous_save(whole_sharded: Path, tmp_path: Path, count: Count) -> None:
    folder = tmp_path / "killed"
    config = configure(folder)
    kill_in_save(config)
    other = tmp_path / "one"
    shutil.copytree(folder, other)
    code, errors = run(config, processes=2)
    assert code == 0, errors
    assert results(folder) == results(whole_sharded)
    assert torch.equal(table(folder), table(whole_sharded))
    assert not list(folder.rglob("*.tmp"))
    assert len(checkpoint_folders(folder / "out")) == 1
    count("two processes, sharded table, killed in a save", kills=1, resumed_runs=1,
          equal_bit_for_bit=1)  # fmt: skip
    # One process continues what two began: the batches are others, the table is not made anew.
    config = write_config(other, *BINDINGS, mode="pretrain")
    code, errors = run(config)
    assert code == 0, errors
    assert "was written by 2 processes and is read by 1" in errors
    assert table(other).shape == table(whole_sharded).shape


@pytest.mark.skipif(importlib.util.find_spec("torchrec") is None, reason="no torchrec")
def test_torchrec_trains_the_same(whole_sharded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "torchrec"
    config = configure(folder, "hpgr.MaskedItemModel.tables = 'torchrec'")
    code, errors = run(config, processes=2)
    assert code == 0, errors
    assert "cannot be had here" not in errors
    for name, value in results(whole_sharded).items():
        assert results(folder)[name] == pytest.approx(value, abs=1e-5), name
    torch.testing.assert_close(table(folder), table(whole_sharded), rtol=1e-4, atol=1e-5)
