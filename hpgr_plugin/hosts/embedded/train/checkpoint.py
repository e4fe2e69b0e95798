"""Checkpoints: a resumed training gives the same numbers as one that was not interrupted."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from hpgr_plugin.errors import HpgrError
from hpgr_plugin.files import atomic_write, crc32
from hpgr_plugin.hosts.embedded.train.distributed import Process, gather_objects
from hpgr_plugin.hosts.embedded.train.run_directory import CHECKPOINT, checkpoint_folders

FORMAT_VERSION = 3
# In the folder that a sharded training writes.
SHARDED_STATE = "state.pt"
SHARDED_BEST = "best_model/"
_CHECKSUM_BYTES = 8  # at the end of the file, in hexadecimal; PyTorch does not read them
_PARTS = ("stage", "generators", "model", "best_model", "optimizer", "progress")


class CheckpointError(HpgrError):
    """A checkpoint that is missing, damaged, or of another training."""


def save_checkpoint(path: Path, state: dict[str, Any], process: Process) -> None:
    """Write `state` and the random generators of all processes; every process calls it.

    Args:
        path: of the checkpoint; the old one stays whole until the new one is written.
        state: tensors, numbers, strings, and lists and dicts of them.
        process: the first process writes.

    Raises:
        CheckpointError: the file cannot be written.
    """
    generators = gather_objects(_generators())
    if not process.is_main:
        return
    content = {"format_version": FORMAT_VERSION, "generators": generators, **_on_host(state)}
    if process.device.type == "cuda":
        torch.cuda.synchronize(process.device)  # the only wait: one for each tensor takes longer
    try:
        with atomic_write(path) as temporary:
            torch.save(content, temporary)
            checksum = f"{crc32(temporary):0{_CHECKSUM_BYTES}x}"
            with temporary.open("ab") as file:
                file.write(checksum.encode())
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def _on_host(value: Any) -> Any:
    """Tensors of nested dicts and lists on the host; those of CUDA are still being copied."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", non_blocking=True)
    if isinstance(value, dict):
        return {name: _on_host(part) for name, part in value.items()}
    return [_on_host(part) for part in value] if isinstance(value, list) else value


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint.

    Where a training with a sharded table left its folders in place of the file, the newest one is
    read: of its weights only the best ones, whole, and nothing of the optimizer.

    Args:
        path: of the checkpoint.
        device: where its tensors are put.

    Raises:
        CheckpointError: no such file, a damaged one, or another format version.
    """
    folders = checkpoint_folders(path.parent) if path.name == CHECKPOINT else []
    if folders and not path.exists():
        return _whole_of_shards(folders[-1], device)
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        _check(path)
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        if missing := [name for name in _PARTS if name not in state]:
            raise KeyError(f"no {', '.join(missing)}")
        version = state["format_version"]
    except (
        OSError,
        RuntimeError,
        ValueError,
        LookupError,
        TypeError,
        EOFError,
        UnpicklingError,
    ) as error:
        raise CheckpointError(f"{path} is damaged or is no checkpoint: {error}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this code reads {FORMAT_VERSION}"
        )
    return state


def _whole_of_shards(folder: Path, device: torch.device) -> dict[str, Any]:
    """The state of a sharded training, with the best weights as one process would hold them."""
    state = load_checkpoint(folder / SHARDED_STATE, device)
    with errors_of(folder):
        stored = FileSystemReader(folder).read_metadata().state_dict_metadata
        best = {
            name: torch.empty(found.size, dtype=found.properties.dtype, device=device)
            for name, found in stored.items()
            if name.startswith(SHARDED_BEST) and isinstance(found, TensorStorageMetadata)
        }
        dcp.load(best, checkpoint_id=folder, no_dist=True)
    weights = {name.removeprefix(SHARDED_BEST): value for name, value in best.items()}
    return {**state, "best_model": weights}


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """What torch raises on the tensors of a sharded training becomes a `CheckpointError`."""
    try:
        yield
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        raise CheckpointError(
            f"{path} is damaged or of another model: {last_line(error)}"
        ) from error


def last_line(error: BaseException) -> str:
    """The last line of an error's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _check(path: Path) -> None:
    with path.open("rb") as file:
        file.seek(-min(_CHECKSUM_BYTES, path.stat().st_size), os.SEEK_END)
        written = file.read()
    if written != f"{crc32(path, leave_out=_CHECKSUM_BYTES):0{_CHECKSUM_BYTES}x}".encode():
        raise ValueError("it differs from its checksum")


def restore_generators(path: Path, states: list[dict[str, Any]], process: Process) -> None:
    """Restore this process's random generators.

    Raises:
        CheckpointError: the checkpoint was written by another number of processes.
    """
    if len(states) != process.world_size:
        raise CheckpointError(
            f"{path} was written by {len(states)} processes, this run has {process.world_size}: "
            "resume with as many"
        )
    state = states[process.rank]
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    algorithm, keys, position, has_gauss, cached = state["numpy"]
    keys = keys.cpu().numpy().astype(np.uint32)
    np.random.set_state((algorithm, keys, position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def load_weights(path: Path, module: nn.Module, weights: dict[str, Any]) -> None:
    """Load weights of a checkpoint into a model.

    Raises:
        CheckpointError: they are of another model.
    """
    try:
        module.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        text = " ".join(str(error).split())
        raise CheckpointError(f"{path} is of another model: {text}") from error


def _generators() -> dict[str, Any]:
    algorithm, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, words, gauss = random.getstate()
    states = {
        "python": [version, list(words), gauss],
        "numpy": [
            algorithm,
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            position,
            has_gauss,
            cached,
        ],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
