"""HPGR for recommenders of the HSTU family: sessions, masked items, time-aware positions, PGSA.

The public names are imported on first use, so importing the package itself is fast.
"""

from __future__ import annotations

import importlib
from typing import Any

from hpgr_plugin.version import __version__

_HOME = {
    "AttentionHook": "hpgr_plugin.components.attention_hooks",
    "HookInputs": "hpgr_plugin.components.attention_hooks",
    "MaskedItemModel": "hpgr_plugin.components.mim",
    "PreferenceGuidedSparseAttention": "hpgr_plugin.components.attention_hooks",
    "PreferencePlan": "hpgr_plugin.ops.preference_plan",
    "SessionEnhancementModule": "hpgr_plugin.components.sem",
    "StochasticLength": "hpgr_plugin.components.attention_hooks",
    "TimeAwarePositionalEncoder": "hpgr_plugin.components.positions",
    "load_handoff": "hpgr_plugin.transfer.handoff",
    "parameter_groups": "hpgr_plugin.transfer.learning_rates",
    "partition_sessions": "hpgr_plugin.components.sessions",
    "plan_preferences": "hpgr_plugin.ops.preference_plan",
    "save_handoff": "hpgr_plugin.transfer.handoff",
    "time_aware_index": "hpgr_plugin.components.positions",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hpgr_plugin' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
