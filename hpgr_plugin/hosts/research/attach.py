"""Attach the slots to the host's retrieval trainer, by its seams where it has them, and detach.

The host puts all parameters into one AdamW group, and its warm-up overwrites the learning rate of
every group. A host with the patch series asks `train_fn.param_groups_fn` for groups, and its
warm-up multiplies by a group's `lr_scale`. In other hosts, hooks around every optimizer step do so.
"""

import contextlib
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from generative_recommenders.research.modeling.sequential import encoder_utils
from generative_recommenders.research.trainer import train
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from hpgr_plugin.config import registry
from hpgr_plugin.hosts.seams import bind, host_has_seam, is_bound, replaced
from hpgr_plugin.transfer.learning_rates import LR_SCALE, by_lr_scale, lr_scale

_PARAM_GROUPS = "train_fn.param_groups_fn"
_undo = contextlib.ExitStack()
_attached = False


def attach() -> None:
    """Let the host's `train_fn` build encoders with slots; a second call changes nothing.

    A host with the patch series takes the optimizer's groups as the gin parameter
    `train_fn.param_groups_fn`, which is bound here unless the configuration binds it.
    `gin.clear_config` removes that binding: call `attach` again then.
    """
    global _attached
    if host_has_seam("param_groups_fn") and not is_bound(_PARAM_GROUPS):
        bind(_PARAM_GROUPS, host_parameter_groups)
    if _attached:
        return
    _attached = True
    if host_has_seam("encoders"):
        for name, built_in in _built_in_encoders().items():
            _register(name, built_in)
    else:
        build = _with_slots(train.get_sequential_encoder)
        _undo.enter_context(replaced(train, get_sequential_encoder=build))
    if host_has_seam("param_groups_fn"):
        _undo.callback(bind, _PARAM_GROUPS, None)
    else:
        _undo.callback(StepHooks().remove)


def detach() -> None:
    """Undo `attach`; encoders that were built before keep their slots."""
    global _attached
    _undo.close()
    _attached = False


def attached() -> bool:
    """Whether `attach` is in force."""
    return _attached


def replaced_names() -> list[str]:
    """The names of the host that are replaced at the moment."""
    own = train.get_sequential_encoder is encoder_utils.get_sequential_encoder
    return [] if own else [f"{train.__name__}.get_sequential_encoder"]


def host_parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """The `param_groups_fn` of a patched host: a group per learning rate.

    Args:
        model: All its parameters are taken.
        learning_rate: That of fresh parameters.
        weight_decay: That of all groups.
    """
    return [
        {
            "params": parameters,
            "lr": learning_rate * scale,
            "weight_decay": weight_decay,
            **_names(scale),
        }
        for scale, parameters in by_lr_scale(model.parameters()).items()
    ]


class StepHooks:
    """Hooks around every optimizer step of this process that apply `lr_scale`.

    Optimizers without inherited parameters are not touched. Between steps an optimizer holds the
    learning rates that the host wrote.
    """

    def __init__(self) -> None:
        self._rates: WeakKeyDictionary[Optimizer, list[float]] = WeakKeyDictionary()
        self._split: WeakKeyDictionary[Optimizer, bool] = WeakKeyDictionary()
        self._handles = [
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer not in self._split:
            self._split[optimizer] = split_groups(optimizer)
        if self._split[optimizer]:
            self._rates[optimizer] = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * group.get(LR_SCALE, 1.0)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        rates = self._rates.pop(optimizer, [])
        for group, rate in zip(optimizer.param_groups, rates, strict=False):
            group["lr"] = rate


def split_groups(optimizer: Optimizer) -> bool:
    """Give inherited parameters groups of their own, with all other settings kept.

    A group whose parameters share one `lr_scale` stays: its optimizer was built with that scale.

    Returns:
        Whether a group was split.
    """
    found = False
    for group in list(optimizer.param_groups):
        scales = by_lr_scale(group["params"])
        if len(scales) < 2:
            continue
        found = True
        group.update(params=scales.pop(1.0, []), **_names(1.0))
        optimizer.param_groups += [
            {**group, "params": parameters, **_names(scale)} for scale, parameters in scales.items()
        ]
    return found


def _names(scale: float) -> dict[str, Any]:
    """What a group of that `lr_scale` carries beside the optimizer's settings."""
    return {"name": "fresh"} if scale == 1.0 else {"name": "inherited", LR_SCALE: scale}


def _built_in_encoders() -> dict[str, Callable[..., Any]]:
    return {"HSTU": encoder_utils.hstu_encoder, "SASRec": encoder_utils.sasrec_encoder}


def _register(name: str, built_in: Callable[..., Any]) -> None:
    """Use the host's registry; a builder that was registered before gets the slots."""
    before = encoder_utils.ENCODERS.get(name)
    encoder_utils.ENCODERS[name] = _with_slots(before or built_in)
    if before is None:
        _undo.callback(encoder_utils.ENCODERS.pop, name)
    else:
        _undo.callback(encoder_utils.ENCODERS.update, {name: before})


def _with_slots(build: Callable[..., Any]) -> Callable[..., Any]:
    """`build` of the host, with the slots filled in what it returns."""

    def build_with_slots(**arguments: Any) -> Any:
        encoder = build(**arguments)
        registry.build("SequentialEncoder").fill(encoder)
        _check_param_groups(encoder)
        return encoder

    return build_with_slots


def _check_param_groups(encoder: nn.Module) -> None:
    """Refuse to train inherited weights at the full learning rate."""
    inherited = any(lr_scale(parameter) != 1.0 for parameter in encoder.parameters())
    if inherited and host_has_seam("param_groups_fn") and not is_bound(_PARAM_GROUPS):
        raise RuntimeError(
            f"{_PARAM_GROUPS} is not bound, so inherited weights would train at the full learning "
            "rate: gin's configuration was cleared; call hosts.research.attach() after that"
        )
