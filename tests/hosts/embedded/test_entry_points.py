"""The commands as a user types them: results, exit codes, one clear line for a mistake."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

CommandLine = Callable[..., list[str]]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=ENVIRONMENT, timeout=300
    )


def test_two_processes_train_one_model(command_line: CommandLine, tmp_path: Path) -> None:
    """torchrun with gloo; one process then computes the same metrics from the checkpoint."""
    flags = command_line(tmp_path, ["hpgr.run.mode = 'finetune'"])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    trained = run([*torchrun, "-m", "hpgr_plugin.main", *flags])
    assert trained.returncode == 0, trained.stderr
    together = json.loads((tmp_path / "results.json").read_text())
    single = run(["-m", "hpgr_plugin.evaluate", *flags])
    assert single.returncode == 0, single.stderr
    metrics = json.loads((tmp_path / "evaluation.json").read_text())["metrics"]
    assert metrics["auc"] == pytest.approx(together["metrics"]["auc"], abs=1e-6)
    assert json.loads((tmp_path / "results.json").read_text()) == together
    assert "FinetuneSettings.epochs = 3" in together["operative_config"]
    assert together["seeds"] == [0]
    assert "torch" in together["environment"]["versions"]


def test_pretrain_writes_a_handoff(command_line: CommandLine, tmp_path: Path) -> None:
    done = run(["-m", "hpgr_plugin.pretrain", *command_line(tmp_path)])
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert Path(metrics["handoff"]).is_file()


@pytest.mark.parametrize(
    ("bindings", "words"),
    [
        (["hpgr.HSTURanker.atention_hook = None"], ["HSTURanker", "atention_hook"]),
        (
            ["hpgr.HSTURanker.attention_hook = @hpgr.SessionEnhancementModule()"],
            ["hpgr.HSTURanker.attention_hook takes", "SessionEnhancementModule"],
        ),
        (["hpgr.HSTURanker.pretrained = '/no/such/file'"], ["/no/such/file"]),
        (["typo/hpgr.HSTURanker.layer = 'mtgr'"], ["typo"]),
        (["hpgr.run.mode = 'trian'"], ["hpgr.run.mode", "trian"]),
        (["hpgr.HSTURanker.num_layers = 0"], ["num_layers", "got 0"]),
        (["hpgr.set_backends.choices = 3"], ["set_backends"]),
        (["hpgr.HSTURanker.num_layers ="], ["--gin_bindings", "line 12"]),
    ],
    ids=[
        "unknown-binding",
        "wrong-slot",
        "missing-file",
        "unread-scope",
        "unknown-mode",
        "out-of-range",
        "wrong-backends",
        "syntax",
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    command_line: CommandLine, tmp_path: Path, bindings: list[str], words: list[str]
) -> None:
    mode = "hpgr.run.mode = 'finetune'"
    done = run(["-m", "hpgr_plugin.main", *command_line(tmp_path, [mode, *bindings])])
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    for word in words:
        assert word in errors[0]


def test_a_bug_keeps_its_traceback(command_line: CommandLine, tmp_path: Path) -> None:
    """Errors of the configuration are caught where things are built, not around the training."""
    flags = command_line(tmp_path, ["hpgr.run.mode = 'finetune'"])
    broken = """
import sys
from hpgr_plugin.cli import run_app
from hpgr_plugin.hosts.embedded.train.trainer import Trainer
def step(*args): raise ValueError("a bug")
Trainer._step = step
run_app()
"""
    done = run(["-c", broken, *flags])
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ValueError: a bug" in done.stderr


def test_a_missing_config_file(tmp_path: Path) -> None:
    done = run(["-m", "hpgr_plugin.main", f"--gin_config_file={tmp_path / 'none.gin'}"])
    assert done.returncode == 2
    assert "none.gin" in done.stderr
    assert "Traceback" not in done.stderr
