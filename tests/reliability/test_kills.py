"""Killed runs: resumed, they give the metrics of a run that was not interrupted, bit for bit."""

import os
import random
import signal
from pathlib import Path

import pytest
from small_run import (
    Count,
    error_lines,
    happens,
    kill_in_training,
    kill_inside_write,
    kill_once,
    processes_of,
    results,
    run,
    start,
    write_config,
)

slow = pytest.mark.slow
ABLATION = (
    "include 'configs/models/hpgr_rows.gin'",
    "hpgr.run.rows = ['hstu', 'base']",
    "hpgr.run.allow_unused = ['SessionEnhancementModule', 'PreferenceGuidedSparseAttention']",
    "hpgr.FinetuneSettings.epochs = 2",
    "CACHE_DIR = 'cache'",
)
LONG = ("hpgr.FinetuneSettings.epochs = 60", "hpgr.FinetuneSettings.patience = 60")
TORCHRUN = ("DROPOUT = 0.3", "hpgr.FinetuneSettings.epochs = 4")


def resumed_equal(config: Path, whole: Path, *, processes: int = 1) -> None:
    code, errors = run(config, processes=processes)
    assert code == 0, errors
    assert not list(config.parent.rglob("*.tmp"))
    assert results(config.parent) == results(whole)


@pytest.fixture(scope="module")
def whole_long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    code, errors = run(write_config(folder, *LONG))
    assert code == 0, errors
    return folder


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=slow)])
def test_killed_at_random_times(whole_long: Path, tmp_path: Path, kills: int, count: Count) -> None:
    config, chance = write_config(tmp_path, *LONG), random.Random(kills)
    killed = sum(kill_in_training(config, chance.uniform(0.1, 0.8)) for _ in range(kills))
    assert killed == kills
    resumed_equal(config, whole_long)
    count("killed at random times", kills=killed, resumed_runs=1, equal_bit_for_bit=1)


@pytest.mark.parametrize(
    "name", ["checkpoint.pt", pytest.param("run.json", marks=slow), pytest.param("*", marks=slow)]
)
def test_killed_inside_a_write(whole: Path, tmp_path: Path, name: str, count: Count) -> None:
    config = write_config(tmp_path)
    kills = kill_inside_write(config, name)
    assert kills
    resumed_equal(config, whole)
    count(f"killed while {name} is half-written", kills=kills, resumed_runs=1, equal_bit_for_bit=1)


@pytest.fixture(scope="module")
def whole_ablation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    code, errors = run(write_config(folder, *ABLATION, mode="ablation"))
    assert code == 0, errors
    return folder


@slow
@pytest.mark.parametrize(
    "name", ["handoff.safetensors", "results.json", "table.md", "*[0-9a-f]", "checkpoint.pt"]
)
def test_an_ablation_killed_inside_a_write(
    whole_ablation: Path, tmp_path: Path, name: str, count: Count
) -> None:
    config = write_config(tmp_path, *ABLATION, mode="ablation")
    kills = kill_inside_write(config, name)
    assert kills
    resumed_equal(config, whole_ablation)
    table = (tmp_path / "out" / "table.md").read_text()
    assert "HPGR base" in table
    shown = "the cache" if name == "*[0-9a-f]" else name
    count(f"killed while {shown} is half-written", kills=kills, resumed_runs=1, equal_bit_for_bit=1)


def test_the_workers_of_a_killed_ablation_end_with_it(tmp_path: Path, count: Count) -> None:
    """They would train on, and write beside the run that resumes."""
    bindings = (*ABLATION, *LONG, "hpgr.run.workers = 2")
    process = start(write_config(tmp_path, *bindings, mode="ablation"))
    assert happens(lambda: len(list(tmp_path.glob("out/*_seed0/checkpoint.pt"))) > 1)
    workers = len(processes_of(process)) - 1
    process.kill()
    process.wait()  # not for the end of its output, which is that of its workers
    ended = happens(lambda: not processes_of(process), seconds=20)
    for left in processes_of(process):
        os.kill(left, signal.SIGKILL)
    assert workers >= 2
    assert ended
    count("killed with two workers", kills=1)


def test_two_processes_with_dropout(tmp_path: Path, count: Count) -> None:
    """Every process goes on with its own random numbers."""
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    whole, killed = (write_config(folder, *TORCHRUN) for folder in folders)
    code, errors = run(whole, processes=2)
    assert code == 0, errors
    checkpoint = folders[1] / "out" / "checkpoint.pt"
    assert kill_once(killed, checkpoint.exists, processes=2)
    code, errors = run(killed)
    assert code == 2
    (line,) = error_lines(errors)
    assert "the number of processes was 2, is 1" in line
    resumed_equal(killed, folders[0], processes=2)
    count("torchrun, two processes, dropout 0.3", kills=1, resumed_runs=1, equal_bit_for_bit=1)
