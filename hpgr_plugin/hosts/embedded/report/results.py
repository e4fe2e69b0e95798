"""results.json: metrics together with all that is needed to reproduce them."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from hpgr_plugin.config.scopes import operative_config_str
from hpgr_plugin.files import atomic_write
from hpgr_plugin.version import __version__

PACKAGES = ("torch", "fbgemm-gpu", "fbgemm-gpu-cpu", "gin-config", "numpy", "triton")


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


def write_results(path: Path, metrics: dict[str, Any], *, seeds: list[int]) -> None:
    """Write metrics, seeds, environment and the operative gin configuration."""
    payload = {
        "metrics": metrics,
        "seeds": seeds,
        "environment": environment(),
        "operative_config": operative_config_str(),
    }
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(payload, indent=2, sort_keys=True) + "\n")
