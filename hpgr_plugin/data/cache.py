"""The cache of prepared data: one folder per log, renamed whole, its checksums checked at load."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from hpgr_plugin.data.events import DataError
from hpgr_plugin.data.log import CategoricalFeature, InteractionLog, PreparedData
from hpgr_plugin.files import crc32

# Raise it when the meaning of a stored array changes: older entries are then not found.
FORMAT = 3
_FEATURES = ("user_features", "item_features")
_TASKS = "task_labels"
_META, _CHECKSUMS = "meta.json", "checksums.json"


def cache_key(sources: Sequence[Path], settings: dict[str, Any]) -> str:
    """Digest of the content of the sources, the settings and the format."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(file_digest(source).encode())
    digest.update(json.dumps([FORMAT, settings], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]


def file_digest(path: Path) -> str:
    """sha256 of the content."""
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def settings_of(component: Any) -> dict[str, Any]:
    """Name and values of a frozen dataclass, without the paths of its data."""
    values = {
        f.name: getattr(component, f.name)
        for f in fields(component)
        if not f.metadata.get("location")
    }
    return {"name": type(component).__name__, **values}


def load(entry: Path) -> PreparedData | None:
    """The entry, its arrays memory-mapped; None where there is none.

    Every file is read once for its checksum, at about 1 GB per second.

    Raises:
        DataError: a file of the entry is damaged.
    """
    if not entry.exists():
        return None
    name = _CHECKSUMS
    try:
        for name, expected in json.loads((entry / _CHECKSUMS).read_text()).items():
            if (found := crc32(entry / name)) != expected:
                raise ValueError(f"crc32 is {found:08x}, expected {expected:08x}")
        name = _META
        meta = json.loads((entry / _META).read_text())
        arrays: dict[str, Any] = {name: _map(entry / f"{name}.npy") for name in meta["arrays"]}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        problem = f"damaged cache entry ({error}); delete its folder"
        raise DataError(problem, file=entry / name) from error
    log = meta["log"] | {
        side: {
            name: CategoricalFeature(
                arrays.pop(f"{side}.{number}"),
                num_values,
                arrays.pop(f"{side}.{number}.values", None),
            )
            for number, (name, num_values) in enumerate(meta[side].items())
        }
        for side in _FEATURES
    }
    log["task_labels"] = {
        name: arrays.pop(f"{_TASKS}.{number}") for number, name in enumerate(meta.get(_TASKS, ()))
    }
    log |= {f.name: arrays.pop(f.name) for f in fields(InteractionLog) if f.name in arrays}
    return PreparedData(log=InteractionLog(**log), **arrays, **meta["prepared"])


def store(entry: Path, prepared: PreparedData) -> None:
    """Writes the entry; its folder appears only when everything in it is written.

    Raises:
        DataError: it cannot be written.
    """
    aside = entry.with_name(f"{entry.name}.{os.getpid()}.tmp")
    try:
        aside.mkdir(parents=True)
        _write(aside, prepared)
        aside.rename(entry)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        problem = f"the cache cannot be written ({error}); see hpgr.prepare_data.cache_dir"
        raise DataError(problem, file=entry) from error


def _write(folder: Path, prepared: PreparedData) -> None:
    values = {f.name: getattr(prepared.log, f.name) for f in fields(InteractionLog)}
    values |= {f.name: getattr(prepared, f.name) for f in fields(PreparedData) if f.name != "log"}
    meta: dict[str, Any] = {}
    for side in _FEATURES:
        features = values.pop(side)
        meta[side] = {name: feature.num_values for name, feature in features.items()}
        for number, feature in enumerate(features.values()):
            values[f"{side}.{number}"] = feature.codes
            values[f"{side}.{number}.values"] = feature.values
    tasks = values.pop(_TASKS)
    meta[_TASKS] = list(tasks)
    values |= {f"{_TASKS}.{number}": labels for number, labels in enumerate(tasks.values())}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    meta |= {
        "arrays": list(arrays),
        "log": {name: values[name] for name in ("num_actions", "item_vocabulary_digest")},
        "prepared": {name: values[name] for name in ("dropped", "settings")},
    }
    (folder / _META).write_text(json.dumps(meta, indent=1, default=str))
    checksums = {path.name: crc32(path) for path in sorted(folder.iterdir())}
    (folder / _CHECKSUMS).write_text(json.dumps(checksums, indent=1))


@contextmanager
def exclusive(entry: Path) -> Iterator[None]:
    """One process at a time for this entry; removes what a killed process left behind.

    The lock is the operating system's and ends with the process that held it.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(entry.with_name(f"{entry.name}.lock")):
        for leftover in entry.parent.glob(f"{entry.name}.*.tmp"):
            shutil.rmtree(leftover)
        yield


def _map(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            yield block
