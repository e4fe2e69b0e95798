"""Learning rates for inherited and fresh weights (section 6 of the method, Eq. 6)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
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
    frozen_epochs: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Optimizer groups named "inherited" and "fresh"; an empty group is left out.

    With `frozen_epochs` there is one more group, "inherited_<name>", for each of its names.

    Args:
        module: its parameters that need no gradient are left out.
        inherited: names of parameters or submodules ("sem" takes "sem.gate"); empty if nothing was
            pre-trained.
        lr: learning rate of the fresh parameters.
        inherited_lr_ratio: inherited parameters have the learning rate `lr * inherited_lr_ratio`;
            0 freezes them, because AdamW multiplies its weight decay by the learning rate.
        weight_decay: of all groups.
        frozen_epochs: inherited name -> epochs, counted from the first, in which a trainer should
            not change it; the group holds the number under "frozen_epochs".

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
    frozen = {name: epochs for name, epochs in (frozen_epochs or {}).items() if epochs > 0}
    if unknown := sorted(frozen.keys() - set(inherited)):
        raise ValueError(f"frozen_epochs takes inherited names, {sorted(inherited)}, got {unknown}")
    held = {f"inherited_{name}": name for name in frozen}
    groups: dict[str, list[nn.Parameter]] = {"inherited": [], "fresh": [], **{n: [] for n in held}}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            is_inherited = any(_covers(n, name) for n in inherited)
            found = (group for group, n in held.items() if _covers(n, name))
            groups[next(found, "inherited" if is_inherited else "fresh")].append(parameter)
    made: list[dict[str, Any]] = []
    for name, members in groups.items():
        if members:
            rate = lr if name == "fresh" else lr * inherited_lr_ratio
            made.append({"name": name, "params": members, "lr": rate, "weight_decay": weight_decay})
            if name in held:
                made[-1]["frozen_epochs"] = frozen[held[name]]
    return made


def _covers(inherited: str, name: str) -> bool:
    return name == inherited or name.startswith(inherited + ".")
