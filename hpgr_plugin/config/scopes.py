"""Scopes of a configuration: one that nothing enters, or that binds nothing, is an error."""

from __future__ import annotations

from gin import config_scope, operative_config_str
from gin.config import _CONFIG, iterate_references

from hpgr_plugin.config.registry import ConfigError

__all__ = ["check_scopes", "config_scope", "operative_config_str"]

_ROWS = ("hpgr.AblationRow", "hpgr.SlateRow")
_ENTERED = ("stage1", "tokenizer")  # parameters of rows that name a scope


def check_scopes() -> None:
    """Check the scopes of all `hpgr` bindings.

    A scope is entered by a row of an ablation or a tokenizer (also one that this run leaves out),
    by the stage 1 or the tokenizer of a row, by `hpgr.run.tokenizers`, or by a reference such as
    `@scope/hpgr.Name()`.

    Raises:
        ConfigError: a scope with bindings that nothing enters, or a scope that is entered and has
            no bindings.
    """
    ours = {key: bound for key, bound in _CONFIG.items() if key[1].startswith("hpgr.")}
    bound = {scope for scope, _ in ours if scope}
    rows = {scope: values for (scope, name), values in ours.items() if name in _ROWS}
    named = {values[key] for values in rows.values() for key in _ENTERED if values.get(key)}
    named |= {
        scope
        for (scope, name), values in ours.items()
        if scope and name == "hpgr.TokenizeSettings" and "tokenizer" in values
    }
    named |= set(_CONFIG.get(("", "hpgr.run"), {}).get("tokenizers", ()))
    references = {
        "/".join(reference.scopes)
        for reference in iterate_references(ours)
        if reference.scopes and reference.config_key[1].startswith("hpgr.")
    }
    entered = {*rows, *named, *references}
    for scope in sorted(entered - bound):
        raise ConfigError(
            f"gin scope {scope!r} is entered and has no bindings (a typo in a reference, or in "
            f"hpgr.AblationRow.stage1?); scopes with bindings: {sorted(bound)}"
        )
    for scope in sorted(bound):
        if not any(f"{other}/".startswith(f"{scope}/") for other in entered):
            raise ConfigError(
                f"nothing enters the gin scope {scope!r} (a typo, or a row without "
                f"hpgr.AblationRow.title); scopes in use: {sorted(entered)}"
            )
