"""A small run on the synthetic log, started as a process of its own, and ways to break it."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

COSTS = ("seconds_per_step", "inference_seconds_per_step", "examples_per_second", "handoff")
Count = Callable[..., None]  # the fixture `count`
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
    "hpgr.FinetuneSettings.epochs = 8",
    "hpgr.FinetuneSettings.patience = 8",
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


def start(
    config: Path, *flags: str, module: str = "main", processes: int = 1, **arguments: Any
) -> subprocess.Popen:
    """`python -m hpgr_plugin.MODULE` on a config, or torchrun of it; output captured."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else [])]
    command += ["-m", f"hpgr_plugin.{module}", f"--gin_config_file={config}"]
    return subprocess.Popen(
        [*command, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=config.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        **arguments,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code, and what was printed to stderr."""
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def run(config: Path, *flags: str, module: str = "main", processes: int = 1) -> tuple[int, str]:
    return finish(start(config, *flags, module=module, processes=processes))


def run_with_file_limit(config: Path, limit_bytes: int) -> tuple[int, str]:
    """Writing past the limit fails, in any file, as on a full disk."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    return finish(start(config, preexec_fn=limited))


def kill(process: subprocess.Popen) -> bool:
    """Kill a run with all of its processes; whether it was still running."""
    running = process.poll() is None
    if running:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return running


def happens(check: Callable[[], bool], *, seconds: float = 120) -> bool:
    """Whether it does within so long."""
    end = time.monotonic() + seconds
    while not check():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def processes_of(process: subprocess.Popen) -> list[int]:
    """Those of a run's group that are running, itself among them."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, group, *_ = status.read_text().rpartition(")")[2].split()
            if int(group) == process.pid and state != "Z":
                found.append(int(status.parent.name))
    return found


def kill_once(
    config: Path, happened: Callable[[], bool], *, later: float = 0.0, processes: int = 1
) -> bool:
    """Start a run and kill it `later` seconds after `happened()`; whether it was still running."""
    process = start(config, processes=processes)
    while process.poll() is None and not happened():
        pass
    time.sleep(later)
    return kill(process)


def kill_in_training(config: Path, seconds: float) -> bool:
    """Start or continue a run and kill it some seconds after it has opened its folder."""
    record = config.parent / "out" / "run.json"

    def written() -> int:
        return record.stat().st_mtime_ns if record.exists() else 0

    before = written()
    return kill_once(config, lambda: written() != before, later=seconds)


def kill_inside_write(config: Path, name: str, *, tries: int = 10) -> int:
    """Kill runs until one leaves the file `name` half-written.

    Args:
        config: of the run.
        name: of the file or folder, which is first written as "NAME.<process>.tmp"; "*" for any.
        tries: that are made.

    Returns:
        The number of runs that were killed; 0 if none left the file half-written.
    """
    folder, kills = config.parent, 0

    def half_written() -> list[Path]:
        try:
            return list(folder.rglob(f"{name}.*.tmp"))
        except FileNotFoundError:  # a folder that was renamed meanwhile
            return []

    for _ in range(tries):
        kills += kill_once(config, lambda: bool(half_written()))
        if half_written():
            return kills
        for left in ("out", "cache"):  # too late: the file is not written again
            shutil.rmtree(folder / left, ignore_errors=True)
    return 0


def error_lines(errors: str) -> Sequence[str]:
    return [line for line in errors.splitlines() if line.startswith("error: ")]


def results(folder: Path, name: str = "results.json") -> Any:
    """The metrics of a run, without how long it took and where it is."""
    metrics = json.loads((folder / "out" / name).read_text())["metrics"]
    return _without_costs(metrics)


def _without_costs(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_costs(part) for key, part in value.items() if key not in COSTS}
    return [_without_costs(part) for part in value] if isinstance(value, list) else value
