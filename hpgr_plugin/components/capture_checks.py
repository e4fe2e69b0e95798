"""When a CUDA graph would not do what a module's code does, and what else a graph depends on.

A replay runs kernels and no Python. What Python would do beside launching them, such as hooks, is
then left out, so such passes are not captured; what it would read belongs to the key of a graph.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# Attributes that every module has, which are no settings.
_OF_ANY_MODULE = vars(nn.Module()).keys() - {"training"}
_PLAIN = (bool, int, float, str, torch.dtype)


def has_hooks(module: nn.Module) -> bool:
    """Whether forward or backward hooks are registered on this module itself."""
    attributes = vars(module)
    return any(map(attributes.__getitem__, _HOOKS))


def why_module_not_captured(module: nn.Module, packages: tuple[str, ...]) -> str | None:
    """What keeps a replay from being a pass of the module, or None.

    Args:
        module: with all inside it.
        packages: prefixes of the Python modules whose classes do nothing but compute. Those of
            `torch.nn.modules` belong to them, wrappers (DDP, FSDP, checkpointing) do not.
    """
    if nn.modules.module._has_any_global_hook():
        return "a global module hook is registered"
    for part in _parts(module):
        if reason := _why_part_not_captured(part, packages):
            name = next(name for name, found in module.named_modules() if found is part)
            return f"{f'{name!r} of ' if name else ''}{type(module).__name__} {reason}"
    return None


def _parts(module: nn.Module) -> list[nn.Module]:
    """The module and all inside it, in a fixed order; `modules()` takes too long for every pass."""
    parts = [module]
    for part in parts:
        parts.extend([m for m in part._modules.values() if m is not None])
    return parts


def _why_part_not_captured(part: nn.Module, packages: tuple[str, ...]) -> str | None:
    attributes, kind = vars(part), type(part)
    if reason := _why_class_not_captured(kind, packages):  # type: ignore[arg-type]
        return reason
    if has_hooks(part):
        return "has hooks"
    if "forward" in attributes or part._compiled_call_impl is not None:
        return "has another forward than its class"
    if "_is_replica" in attributes:
        return "is a replica of DataParallel"
    return None


@functools.lru_cache(maxsize=256)
def _why_class_not_captured(kind: type, packages: tuple[str, ...]) -> str | None:
    if not kind.__module__.startswith(("torch.nn.modules.", *packages)):
        return f"is of class {kind.__module__}.{kind.__name__}, whose code may do more than compute"
    if issubclass(kind, _NormBase):
        return "takes statistics over all rows, also those of the padding"
    return None


def why_pass_not_captured() -> str | None:
    """What in the state of PyTorch keeps a replay from being the pass that runs now, or None."""
    if torch.compiler.is_compiling():
        return "torch.compile traces it"
    if torch.is_anomaly_enabled():
        return "anomaly detection is on"
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode is on"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "hooks on saved tensors are on, as in checkpointing"
    if torch._C._current_graph_task_id() != -1:
        return "it runs inside a backward pass, as in checkpointing"
    return None


def settings(module: nn.Module) -> Hashable:
    """Classes and plain attributes of the module and all inside it.

    Training flags, dropout rates, dtypes and kernel choices are among them; tensors and containers
    are not.
    """
    found: list[Any] = []
    for part in _parts(module):
        found.append(type(part))
        for name, value in vars(part).items():
            if name not in _OF_ANY_MODULE and (plain := _plain(value)) is not None:
                found += (name, plain)
    return tuple(found)


def _plain(value: Any) -> Hashable:
    """A number, text, dtype, or the name of an enum's member; None for anything else."""
    if isinstance(value, enum.Enum):
        return value._name_
    return value if isinstance(value, _PLAIN) else None


def state_of_torch() -> Hashable:
    """What decides which kernels an operation on CUDA launches."""
    return (
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        torch.are_deterministic_algorithms_enabled(),
    )
