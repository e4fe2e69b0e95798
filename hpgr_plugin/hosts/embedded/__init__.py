"""The embedded host: a compact HSTU ranking trainer, so that everything runs without another."""

from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker, SlotError
from hpgr_plugin.hosts.embedded.run import run

__all__ = ["HSTURanker", "SlotError", "run"]
