"""The smaller rate of inherited weights in an optimizer that the host builds and warms up.

The host puts all parameters into one AdamW group, and its warm-up writes one rate into every
group for good. So the share of an inherited parameter is kept on the parameter, and a group
carries it as `lr_scale`. With the patch series the host itself asks for groups and honours
`lr_scale`; without it hooks around the step multiply the rate and put it back after.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from hpgr_plugin.transfer.learning_rates import parameter_groups

LR_SCALE = "lr_scale"
_RATIO = "_hpgr_research_lr_ratio"


def mark_inherited(parameters: Iterable[nn.Parameter], ratio: float) -> None:
    """Let `parameters` train at `ratio` times the host's rate.

    Raises:
        ValueError: a ratio outside [0, 1].
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"inherited_lr_ratio must be in [0, 1], got {ratio}")
    for parameter in parameters:
        setattr(parameter, _RATIO, ratio)


def has_inherited(module: nn.Module) -> bool:
    """Whether any parameter of `module` was marked."""
    return any(hasattr(parameter, _RATIO) for parameter in module.parameters())


def host_parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """What the host's `param_groups_fn` returns: the rates, and `lr_scale` for its warm-up."""
    ratios = {
        name: getattr(parameter, _RATIO)
        for name, parameter in model.named_parameters()
        if hasattr(parameter, _RATIO)
    }
    ratio = next(iter(ratios.values()), 1.0)
    groups = parameter_groups(
        model,
        inherited=ratios.keys(),
        lr=learning_rate,
        inherited_lr_ratio=ratio,
        weight_decay=weight_decay,
    )
    for group in groups:
        if group["name"] == "inherited":
            group[LR_SCALE] = ratio
    return groups


class StepHooks:
    """Hooks around every optimizer step of this process; only optimizers with inherited weights
    notice them. Between steps the host sees the rate it wrote."""

    def __init__(self) -> None:
        self._rates: WeakKeyDictionary[Optimizer, list[float]] = WeakKeyDictionary()
        self._split: WeakKeyDictionary[Optimizer, bool] = WeakKeyDictionary()
        self._handles = [
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
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
        for group, rate in zip(
            optimizer.param_groups, self._rates.pop(optimizer, []), strict=False
        ):
            group["lr"] = rate


def split_groups(optimizer: Optimizer) -> bool:
    """Give inherited parameters groups of their own, all other settings kept.

    Returns:
        Whether there were any.
    """
    found = False
    for group in list(optimizer.param_groups):
        inherited = [p for p in group["params"] if hasattr(p, _RATIO)]
        if not inherited:
            continue
        found = True
        inherited_ids = {id(p) for p in inherited}
        group["params"] = [p for p in group["params"] if id(p) not in inherited_ids]
        group["name"] = "fresh"
        ratio = getattr(inherited[0], _RATIO)
        optimizer.param_groups.append(
            {**group, "params": inherited, "name": "inherited", LR_SCALE: ratio}
        )
    return found
