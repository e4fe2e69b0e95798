"""Checkpoints: a resumed training gives the same numbers as one that was not interrupted."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpgr_plugin.errors import HpgrError
from hpgr_plugin.files import atomic_write

FORMAT_VERSION = 1


class CheckpointError(HpgrError):
    """A checkpoint that is missing or has another format version."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` and the states of all random generators.

    Args:
        path: of the checkpoint.
        state: tensors, numbers, strings, and lists and dicts of them.
    """
    content = {"format_version": FORMAT_VERSION, "generators": _generators(), **state}
    with atomic_write(path) as temporary:
        torch.save(content, temporary)


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint and restore the random generators.

    Args:
        path: of the checkpoint.
        device: where its tensors are put.

    Raises:
        CheckpointError: no such file, or another format version.
    """
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}")
    state = torch.load(path, map_location=device, weights_only=True)
    version = state.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this code reads {FORMAT_VERSION}"
        )
    _restore_generators(state["generators"])
    return state


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


def _restore_generators(states: dict[str, Any]) -> None:
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    algorithm, keys, position, has_gauss, cached = states["numpy"]
    keys = keys.cpu().numpy().astype(np.uint32)
    np.random.set_state((algorithm, keys, position, has_gauss, cached))
    torch.set_rng_state(states["torch"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
