"""Learning rates for inherited and fresh weights (section 6 of the method, Eq. 6)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor, nn

from hpgr_plugin.errors import HpgrError

# An attribute of a parameter: it survives renaming and sharding, and the optimizers of a host with
# the patch series read it too. Optimizer groups carry it under the same key.
LR_SCALE = "lr_scale"


def check_lr_ratio(ratio: Any) -> None:
    """Check `inherited_lr_ratio`.

    Raises:
        HpgrError: It is not a number in [0, 1].
    """
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0.0 <= ratio <= 1.0:
        raise HpgrError(f"inherited_lr_ratio must be in [0, 1], got {ratio!r}")


def mark_inherited(parameters: Iterable[nn.Parameter], ratio: float) -> None:
    """Let an upstream host's optimizers train `parameters` at `ratio` times its learning rate.

    Raises:
        HpgrError: A ratio outside [0, 1].
    """
    check_lr_ratio(ratio)
    for parameter in parameters:
        setattr(parameter, LR_SCALE, ratio)


def lr_scale(parameter: Any) -> float:
    """The ratio that `mark_inherited` set on a parameter, 1 for all others."""
    return float(getattr(parameter, LR_SCALE, 1.0))


def by_lr_scale(parameters: Iterable[Tensor]) -> dict[float, list[Tensor]]:
    """The parameters of each `lr_scale`, in the order of first appearance."""
    groups: dict[float, list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault(lr_scale(parameter), []).append(parameter)
    return groups


def parameter_groups(
    module: nn.Module,
    *,
    inherited: Collection[str],
    lr: float,
    inherited_lr_ratio: float = 0.1,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Optimizer groups named "inherited" and "fresh"; an empty group is left out.

    Args:
        module: its parameters that need no gradient are left out.
        inherited: names of parameters or submodules ("sem" takes "sem.gate"); empty if nothing was
            pre-trained.
        lr: learning rate of the fresh parameters.
        inherited_lr_ratio: inherited parameters have the learning rate `lr * inherited_lr_ratio`;
            0 freezes them, because AdamW multiplies its weight decay by the learning rate.
        weight_decay: of both groups.

    Raises:
        ValueError: a ratio outside [0, 1], a negative lr or weight decay, or an inherited name that
            no parameter has.
    """
    check_lr_ratio(inherited_lr_ratio)
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if value < 0.0:
            raise ValueError(f"{name} must be 0 or more, got {value}")
    if isinstance(inherited, str):
        raise ValueError(f"inherited must be a collection of names, got the string {inherited!r}")

    parameters = dict(module.named_parameters())
    unknown = [n for n in inherited if not any(_covers(n, name) for name in parameters)]
    if unknown:
        raise ValueError(
            f"inherited must name parameters of {type(module).__name__}, got {unknown}; "
            f"it has {sorted({name.split('.')[0] for name in parameters})}"
        )
    groups: dict[str, list[nn.Parameter]] = {"inherited": [], "fresh": []}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            is_inherited = any(_covers(n, name) for n in inherited)
            groups["inherited" if is_inherited else "fresh"].append(parameter)
    rates = {"inherited": lr * inherited_lr_ratio, "fresh": lr}
    return [
        {"name": name, "params": group, "lr": rates[name], "weight_decay": weight_decay}
        for name, group in groups.items()
        if group
    ]


def _covers(inherited: str, name: str) -> bool:
    return name == inherited or name.startswith(inherited + ".")
