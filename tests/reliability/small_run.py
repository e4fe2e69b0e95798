"""A small run on the synthetic log, started as a process of its own, and ways to break it."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BINDINGS = (
    "include 'configs/data/synthetic.gin'",
    "include 'configs/models/hpgr_base.gin'",
    "NUM_USERS = 60",
    "EMBEDDING_DIM = 16",
    "NUM_LAYERS = 1",
    "hpgr.run.seeds = [0]",
    "hpgr.RequestLoader.batch_tokens = 512",
    "hpgr.SequenceLoader.batch_tokens = 512",
    "hpgr.PretrainSettings.epochs = 2",
    "hpgr.FinetuneSettings.epochs = 3",
    "hpgr.PretrainSettings.checkpoint_every = 3",
    "hpgr.FinetuneSettings.checkpoint_every = 3",
)


def write_config(folder: Path, *bindings: str, mode: str = "finetune", out: str = "out") -> Path:
    """A run file in `folder` whose output is `folder/out`."""
    path = folder / "run.gin"
    lines = [
        *BINDINGS,
        f"hpgr.run.mode = '{mode}'",
        f"hpgr.run.output_dir = '{folder / out}'",
        *bindings,
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def start(config: Path, *flags: str, module: str = "main", **arguments: Any) -> subprocess.Popen:
    """`python -m hpgr_plugin.MODULE` on a config, output captured."""
    command = [sys.executable, "-m", f"hpgr_plugin.{module}", f"--gin_config_file={config}"]
    return subprocess.Popen(
        [*command, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=config.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        **arguments,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code, and what was printed to stderr."""
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def run(config: Path, *flags: str, module: str = "main") -> tuple[int, str]:
    return finish(start(config, *flags, module=module))


def run_with_file_limit(config: Path, limit_bytes: int) -> tuple[int, str]:
    """Writing past the limit fails, in any file, as on a full disk."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    return finish(start(config, preexec_fn=limited))


def kill_after(config: Path, seconds: float) -> bool:
    """Start a run and kill it; whether it was still running."""
    process = start(config)
    time.sleep(seconds)
    running = process.poll() is None
    process.kill()
    process.communicate()
    return running


def error_lines(errors: str) -> Sequence[str]:
    return [line for line in errors.splitlines() if line.startswith("error: ")]
