"""The cache of prepared data: written aside and renamed whole, so a kill leaves no half of it."""

from __future__ import annotations

import fcntl
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

from hpgr_plugin.data.events import DataError
from hpgr_plugin.data.log import CategoricalFeature, InteractionLog, PreparedData

# Raise it when the meaning of a stored array changes: old entries are then never found.
FORMAT = 1
_LOG_ARRAYS = (
    "user_offsets",
    "item",
    "timestamp",
    "action",
    "label",
    "item_ids",
    "user_ids",
    "group",
)
_PART_ARRAYS = ("split", "is_history", "is_candidate")
_META = "meta.json"


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
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def settings_of(component: Any) -> dict[str, Any]:
    """Name and values of a frozen dataclass, without where its data lies."""
    values = {
        f.name: getattr(component, f.name)
        for f in fields(component)
        if not f.metadata.get("location")
    }
    return {"name": type(component).__name__, **values}


def load(entry: Path) -> PreparedData | None:
    """The entry, its arrays mapped from the files; None where there is none.

    Raises:
        DataError: the entry is damaged.
    """
    if not (entry / _META).exists():
        return None
    try:
        meta = json.loads((entry / _META).read_text())
        arrays: dict[str, Any] = {name: _map(entry / f"{name}.npy") for name in meta["arrays"]}
        features: dict[str, Any] = {
            side: {
                name: CategoricalFeature(_map(entry / f"{side}.{number}.npy"), num_values)
                for number, (name, num_values) in enumerate(meta[side].items())
            }
            for side in ("user_features", "item_features")
        }
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"damaged cache entry ({error}); delete the folder", file=entry) from error
    parts = {name: arrays.pop(name) for name in _PART_ARRAYS}
    log = InteractionLog(**arrays, **features, **meta["log"])
    return PreparedData(log=log, **parts, dropped=meta["dropped"])


def store(entry: Path, prepared: PreparedData, about: dict[str, Any]) -> None:
    """Writes the entry; `about` goes into its meta.json for people to read."""
    aside = entry.with_name(f"{entry.name}.{os.getpid()}.tmp")
    aside.mkdir(parents=True)
    log = prepared.log
    arrays = {name: getattr(log, name) for name in _LOG_ARRAYS if getattr(log, name) is not None}
    arrays |= {name: getattr(prepared, name) for name in _PART_ARRAYS}
    for name, array in arrays.items():
        np.save(aside / f"{name}.npy", array)
    meta: dict[str, Any] = {
        "about": about,
        "arrays": list(arrays),
        "log": {
            "num_actions": log.num_actions,
            "item_vocabulary_digest": log.item_vocabulary_digest,
        },
        "dropped": prepared.dropped,
    }
    for side in ("user_features", "item_features"):
        features = getattr(log, side)
        meta[side] = {name: feature.num_values for name, feature in features.items()}
        for number, feature in enumerate(features.values()):
            np.save(aside / f"{side}.{number}.npy", feature.codes)
    (aside / _META).write_text(json.dumps(meta, indent=1, default=str))
    aside.rename(entry)


@contextmanager
def exclusive(entry: Path) -> Iterator[None]:
    """One process at a time for this entry; what a killed one left aside is removed.

    The lock is the kernel's and goes with the process that held it.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    with entry.with_name(f"{entry.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in entry.parent.glob(f"{entry.name}.*.tmp"):
            shutil.rmtree(leftover)
        yield


def _map(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)
