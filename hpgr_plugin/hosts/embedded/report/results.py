"""results.json: figures together with all that is needed to get them again."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import gin
import torch

from hpgr_plugin.version import __version__

PACKAGES = (
    "torch",
    "fbgemm-gpu",
    "fbgemm-gpu-cpu",
    "gin-config",
    "numpy",
    "torchmetrics",
    "triton",
)


def environment() -> dict[str, Any]:
    """Versions, machine and command of this run."""
    versions = {"hpgr-plugin": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "command": " ".join(["python", *sys.argv]),
        "versions": versions,
        "device": device,
        "threads": torch.get_num_threads(),
    }


def write_results(path: Path, figures: dict[str, Any], *, seeds: list[int]) -> None:
    """Write figures, seeds, environment and the operative gin config; a kill leaves no half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = {
        "figures": figures,
        "seeds": seeds,
        "environment": environment(),
        "operative_config": gin.operative_config_str(),
    }
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(payload, indent=2, sort_keys=True) + "\n")
    os.replace(temporary, path)
