"""Importing this registers every component with gin, so that a config needs no imports."""

from hpgr_plugin import data, handoff, mim, positions, sem
from hpgr_plugin.hosts import embedded
from hpgr_plugin.pgsa import hooks

__all__ = ["data", "embedded", "handoff", "hooks", "mim", "positions", "sem"]
