"""Importing this registers every component with gin, so that a config needs no imports."""

from hpgr_plugin import data
from hpgr_plugin.components import attention_hooks, mim, positions, sem
from hpgr_plugin.hosts import embedded
from hpgr_plugin.hosts.embedded.model import mtgr

__all__ = ["attention_hooks", "data", "embedded", "mim", "mtgr", "positions", "sem"]
