"""Plug HPGR into HSTU-style recommenders: sessions, masked items, time-aware positions, PGSA."""

from hpgr_plugin.version import __version__

__all__ = ["__version__"]
