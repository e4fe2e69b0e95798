"""Configurations that travel with a model: gin text, read without touching that of the process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gin
from gin import config as gin_config

from hpgr_plugin.config.bindings import _resolve_macro, check_types
from hpgr_plugin.config.registry import ConfigError, build
from hpgr_plugin.config.scopes import config_scope, operative_config_str


def bound_value(parameter: str, default: Any) -> Any:
    """The value bound to "hpgr.name.parameter", or the default."""
    try:
        return _resolve_macro(gin.query_parameter(parameter))
    except ValueError:
        return default


@contextmanager
def separate_config() -> Iterator[None]:
    """Inside, gin holds no bindings; afterwards it holds those of before."""
    bindings, operative = dict(gin_config._CONFIG), dict(gin_config._OPERATIVE_CONFIG)
    imports, locked = set(gin_config._IMPORTS), gin_config.config_is_locked()
    gin.clear_config()
    try:
        yield
    finally:
        gin.clear_config()
        gin_config._IMPORTS.update(imports)
        gin_config._CONFIG.clear()
        gin_config._CONFIG.update(bindings)
        gin_config._OPERATIVE_CONFIG.update(operative)
        gin_config._set_config_is_locked(locked)


@contextmanager
def recorded_config() -> Iterator[list[str]]:
    """Yields a list that holds, when the block has ended, what the block read, as gin text."""
    operative = dict(gin_config._OPERATIVE_CONFIG)
    gin_config._OPERATIVE_CONFIG.clear()
    text: list[str] = []
    try:
        yield text
        text.append(operative_config_str())
    finally:
        gin_config._OPERATIVE_CONFIG.update(operative)


def build_all(text: str, scope: str, made: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Build `hpgr.NAME` with its arguments for every NAME in `made`, as stored text configures it.

    Args:
        text: of `recorded_config`.
        scope: gin scope that was active, "" for none.
        made: name -> arguments, which have precedence over bindings.

    Raises:
        ConfigError: text that cannot be read, or that names what this version does not have.
    """
    with separate_config():
        try:
            gin.parse_config(text)
        except (ValueError, SyntaxError, ImportError, TypeError) as error:
            raise ConfigError(f"the stored configuration cannot be read: {error}") from error
        check_types()
        with config_scope(scope or None):
            return {name: build(name, **arguments) for name, arguments in made.items()}
