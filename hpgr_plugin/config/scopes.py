"""A gin scope that nothing enters would silently bind nothing: here that is an error."""

from __future__ import annotations

import re

import gin

# Lines of the configuration as gin writes it, names shortened to what is unambiguous.
_SCOPED_BINDING = re.compile(r"^([\w/]+)/[\w.]+\.\w+ = ", re.MULTILINE)
# A reference that enters a scope itself: @scope/name()
_SCOPED_REFERENCE = re.compile(r"@([\w/]+)/[\w.]+")
# A row of an ablation, also one that this run leaves out, and the stage 1 it starts from.
_ROW_SCOPE = re.compile(r"^([\w/]+)/(?:hpgr\.)?row\.\w+ = ", re.MULTILINE)
_STAGE1_SCOPE = re.compile(r"(?:^|/)(?:hpgr\.)?row\.stage1 = '([\w/]+)'", re.MULTILINE)


def check_scopes() -> None:
    """Every scope of the configuration is an ablation row's, its stage 1's, or a reference's.

    Raises:
        ValueError: naming the scope, and those in use.
    """
    config = gin.config_str()
    used = {
        scope
        for pattern in (_ROW_SCOPE, _STAGE1_SCOPE, _SCOPED_REFERENCE)
        for scope in pattern.findall(config)
    }
    for scope in _SCOPED_BINDING.findall(config):
        if scope not in used:
            raise ValueError(
                f"nothing reads the gin scope {scope!r} (a typo, or a row without "
                f"hpgr.row.title); scopes in use: {sorted(used)}"
            )
