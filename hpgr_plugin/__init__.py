"""Plug HPGR into HSTU-style recommenders: sessions, masked items, time-aware positions, PGSA.

The public names are loaded on first use, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

from hpgr_plugin.version import __version__

_HOME = {
    "AttentionHook": "hpgr_plugin.pgsa.hooks",
    "MaskedItemModel": "hpgr_plugin.mim",
    "PreferenceGuidedSparseAttention": "hpgr_plugin.pgsa.hooks",
    "PreferencePlan": "hpgr_plugin.pgsa.preferences",
    "SessionEnhancementModule": "hpgr_plugin.sem",
    "StochasticLength": "hpgr_plugin.pgsa.hooks",
    "TimeAwarePositionalEncoder": "hpgr_plugin.positions",
    "load_handoff": "hpgr_plugin.handoff",
    "parameter_groups": "hpgr_plugin.optim",
    "partition_sessions": "hpgr_plugin.sessions",
    "plan_preferences": "hpgr_plugin.pgsa.plan",
    "save_handoff": "hpgr_plugin.handoff",
    "time_aware_index": "hpgr_plugin.positions",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hpgr_plugin' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
