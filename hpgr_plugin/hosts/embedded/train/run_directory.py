"""The folder of a run: one run at a time, and a record of what was trained in it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from hpgr_plugin.errors import HpgrError
from hpgr_plugin.files import atomic_write, remove_temporary_files
from hpgr_plugin.hosts.embedded.train.distributed import Process, broadcast

RECORD = "run.json"
CHECKPOINT = "checkpoint.pt"
_FOLDER = re.compile(r"checkpoint-(\d+)")  # of a sharded training
State = Literal["new", "unfinished", "finished"]


def checkpoint_folders(directory: Path) -> list[Path]:
    """The complete checkpoints of a sharded training, the oldest first."""
    found = {path: _FOLDER.fullmatch(path.name) for path in directory.glob("checkpoint-*")}
    numbers = {path: int(match[1]) for path, match in found.items() if match}
    return sorted(numbers, key=numbers.__getitem__)


def next_checkpoint(directory: Path) -> Path:
    """The folder that comes after the complete checkpoints."""
    found = checkpoint_folders(directory)
    last = int(found[-1].name.removeprefix("checkpoint-")) if found else 0
    return directory / f"checkpoint-{last + 1}"


class RunError(HpgrError):
    """A folder that holds another run, or that another process is using."""


@dataclass(frozen=True)
class RunIdentity:
    """What has to agree for one run to continue another.

    Attributes:
        bindings: every gin binding that can change the result, as text.
        data: digest of the prepared data.
        seeds: of the trainings.
        world_size: number of processes; None where any number can continue the run.
    """

    bindings: dict[str, str]
    data: str
    seeds: list[int]
    world_size: int | None

    def differences(self, other: RunIdentity) -> list[str]:
        """One phrase for everything in which `other`, the recorded run, differs."""
        mine, theirs = self._flat(), other._flat()
        return [
            f"{name} was {theirs.get(name, 'not bound')}, is {mine.get(name, 'not bound')}"
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
        ]

    def _flat(self) -> dict[str, str]:
        processes = "any" if self.world_size is None else str(self.world_size)
        others = {"the data": self.data, "the seeds": str(self.seeds)}
        return {**self.bindings, **others, "the number of processes": processes}


@contextmanager
def open_run(
    directory: Path, identity: RunIdentity, *, overwrite: bool, process: Process
) -> Iterator[State]:
    """Lock the folder and record the run in it; it is finished when the block ends.

    Files that a killed run left half-written are removed.

    Args:
        directory: made if it is not there.
        identity: of this run.
        overwrite: start anew, whatever the folder holds.
        process: the first process decides for all.

    Yields:
        "new", "unfinished" (continue from the checkpoints) or "finished" (nothing to do).

    Raises:
        RunError: another process is using the folder, or it holds a run that differs.
    """
    lock = FileLock(directory / ".lock")
    answer: State | str = ""
    if process.is_main:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
            answer = _enter(directory, identity, overwrite)
        except Timeout:
            answer = f"{directory} is in use by another run: choose another hpgr.run.output_dir"
        except RunError as error:
            answer = str(error)
    answer = broadcast(answer)
    try:
        if answer not in ("new", "unfinished", "finished"):
            raise RunError(answer)
        yield answer
        if process.is_main:
            _write(directory, identity, "finished")
    finally:
        lock.release()


def check_trained_with(directory: Path, identity: RunIdentity) -> None:
    """Check that the checkpoint in a folder was trained with this configuration and data.

    Raises:
        RunError: there is no run, or it differs.
    """
    if not (directory / RECORD).exists():
        raise RunError(f"{directory} holds no run to evaluate: there is no {RECORD}")
    recorded, _ = _read(directory)
    identity = replace(identity, world_size=recorded.world_size)  # any number can evaluate
    _refuse_differences(directory, identity, recorded, "so its checkpoint is of another model")


def _enter(directory: Path, identity: RunIdentity, overwrite: bool) -> State:
    remove_temporary_files(directory)
    state: State = "new"
    folders = [path for path in directory.rglob("checkpoint-*") if _FOLDER.fullmatch(path.name)]
    checkpoints = [*directory.rglob(CHECKPOINT), *folders]
    if overwrite:
        for path in checkpoints:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif (directory / RECORD).exists():
        recorded, finished = _read(directory)
        hint = "bind hpgr.run.overwrite = True to start anew, or another hpgr.run.output_dir"
        _refuse_differences(directory, identity, recorded, hint)
        state = "finished" if finished else "unfinished"
    elif checkpoints:
        raise RunError(
            f"{directory} holds {checkpoints[0].name} but no {RECORD}, so what it was trained with "
            "is not known: bind hpgr.run.overwrite = True to start anew"
        )
    if state != "finished":
        _write(directory, identity, "unfinished")
    return state


def _refuse_differences(
    directory: Path, identity: RunIdentity, recorded: RunIdentity, hint: str
) -> None:
    differing = identity.differences(recorded)
    if differing:
        raise RunError(f"{directory} holds a run that differs: {'; '.join(differing)}; {hint}")


def _read(directory: Path) -> tuple[RunIdentity, bool]:
    path = directory / RECORD
    try:
        content = json.loads(path.read_text())
        return RunIdentity(**content["identity"]), content["state"] == "finished"
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path} cannot be read ({error}): bind hpgr.run.overwrite = True to start anew"
        ) from error


def _write(directory: Path, identity: RunIdentity, state: State) -> None:
    with atomic_write(directory / RECORD) as path:
        path.write_text(json.dumps({"state": state, "identity": asdict(identity)}, indent=1))
