"""Attach the slots to the host's trainer, by its seams where it has them, and take them off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gin
from generative_recommenders.research.modeling.sequential import encoder_utils
from generative_recommenders.research.trainer import train as host_train

from hpgr_plugin.hosts.research.learning_rates import (
    StepHooks,
    has_inherited,
    host_parameter_groups,
)
from hpgr_plugin.hosts.research.model import fill_slots
from hpgr_plugin.hosts.seams import host_has_seam

_PARAM_GROUPS = "train_fn.param_groups_fn"
_undo: list[Callable[[], None]] = []


def attach() -> None:
    """Let the host's `train_fn` build encoders with slots.

    Attached already, it only renews the binding of `train_fn.param_groups_fn`, which
    `gin.clear_config` takes away. A binding of the user's own is kept.
    """
    groups_by_host = host_has_seam("param_groups_fn")
    if groups_by_host and not _param_groups_bound():
        _bind_param_groups(host_parameter_groups)
    if _undo:
        return
    if host_has_seam("encoders"):
        for name, builder in _built_in_encoders().items():
            _register(name, builder)
    else:
        _replace_encoder_function()
    if groups_by_host:
        _undo.append(lambda: _bind_param_groups(None))
    else:
        _undo.append(StepHooks().remove)


def detach() -> None:
    """Leave the host as it was before `attach`."""
    while _undo:
        _undo.pop()()


def attached() -> bool:
    """Whether `attach` is in force."""
    return bool(_undo)


def replaced_names() -> list[str]:
    """The names of the host that are not its own at the moment."""
    own = host_train.get_sequential_encoder is encoder_utils.get_sequential_encoder
    return [] if own else [f"{host_train.__name__}.get_sequential_encoder"]


def _built_in_encoders() -> dict[str, Callable[..., Any]]:
    return {"HSTU": encoder_utils.hstu_encoder, "SASRec": encoder_utils.sasrec_encoder}


def _register(name: str, built_in: Callable[..., Any]) -> None:
    """Use the host's registry; a builder that someone registered before is the one to fill."""
    before = encoder_utils.ENCODERS.get(name)
    build = before or built_in

    def build_with_slots(**arguments: Any) -> Any:
        return _fill(build(**arguments))

    def undo() -> None:
        del encoder_utils.ENCODERS[name]
        if before is not None:
            encoder_utils.ENCODERS[name] = before

    encoder_utils.ENCODERS[name] = build_with_slots
    _undo.append(undo)


def _replace_encoder_function() -> None:
    """Replace the name that `train_fn` looks up; the host's function still does the building."""
    build = host_train.get_sequential_encoder

    def get_sequential_encoder_with_slots(**arguments: Any) -> Any:
        return _fill(build(**arguments))

    def undo() -> None:
        host_train.get_sequential_encoder = build

    host_train.get_sequential_encoder = get_sequential_encoder_with_slots
    _undo.append(undo)


def _bind_param_groups(function: Callable[..., Any] | None) -> None:
    with gin.unlock_config():
        gin.bind_parameter(_PARAM_GROUPS, function)


def _fill(encoder: Any) -> Any:
    encoder = fill_slots(encoder)
    if has_inherited(encoder) and host_has_seam("param_groups_fn") and not _param_groups_bound():
        raise RuntimeError(
            f"{_PARAM_GROUPS} is not bound, so inherited weights would train at the full rate: "
            "gin's configuration was cleared; call hosts.research.attach() after that"
        )
    return encoder


def _param_groups_bound() -> bool:
    try:
        return gin.query_parameter(_PARAM_GROUPS) is not None
    except ValueError:
        return False
