"""A gin scope that nothing enters would silently bind nothing: here that is an error."""

from __future__ import annotations

import re
from collections.abc import Collection

import gin

# "scope/module.name.parameter = value", as gin writes its configuration
_SCOPED_BINDING = re.compile(r"^([\w/]+)/[\w.]+\.\w+ = ", re.MULTILINE)
# "@scope/module.name()": a reference that enters the scope itself
_SCOPED_REFERENCE = re.compile(r"@([\w/]+)/[\w.]+")


def check_scopes(known: Collection[str]) -> None:
    """Every scope of the configuration is entered by the run or by a reference in it.

    Args:
        known: scopes that the run enters.

    Raises:
        ValueError: naming the scope and what the known ones are.
    """
    config = gin.config_str()
    entered = {*known, *_SCOPED_REFERENCE.findall(config)}
    for scope in _SCOPED_BINDING.findall(config):
        if scope not in entered:
            raise ValueError(
                f"nothing reads the gin scope {scope!r} (a typo, or a row missing from "
                f"hpgr.run.rows); scopes in use: {sorted(entered)}"
            )
