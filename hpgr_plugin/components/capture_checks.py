"""When a CUDA graph would not do what a module's code does, and what else a graph depends on.

A replay runs kernels and no Python. What Python would do beside launching them, such as hooks, is
then left out, so such passes are not captured; what it would read belongs to the key of a graph.
"""

from __future__ import annotations

import enum
import functools
import operator
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_hooks_of = operator.itemgetter(*_HOOKS)
# Attributes that every module has, which are no settings.
_OF_ANY_MODULE = vars(nn.Module()).keys() - {"training"}
_PLAIN = (bool, int, float, str, torch.dtype)
_COMPARED = (*_PLAIN, enum.Enum, type(None))


def has_hooks(module: nn.Module) -> bool:
    """Whether forward or backward hooks are registered on this module itself."""
    return any(_hooks_of(vars(module)))


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


_Tensors = Mapping[str, Tensor | None]


class ModuleState(NamedTuple):
    """What captured passes of a module depend on.

    Attributes:
        why_not: see `why_module_not_captured`; with a reason, nothing else is collected.
        settings: see `settings`.
        tensors: its parameters and buffers by name.
    """

    why_not: str | None
    settings: Hashable
    tensors: dict[str, Tensor]


class _Part(NamedTuple):
    """What a module without hooks was made of, by itself.

    Attributes:
        kind: its class.
        size: how many attributes it had.
        read: reads the values of those that may be settings, first the plain ones.
        plain: the values of the plain ones.
        kinds: the classes of all these values.
        children: the modules directly inside, in their order.
        tensors: its parameters and buffers, and how many there were of each.
    """

    kind: type
    size: int
    read: Callable[[dict[str, Any]], tuple[Any, ...]]
    plain: tuple[Any, ...]
    kinds: tuple[type, ...]
    children: list[tuple[str, nn.Module | None]]
    tensors: tuple[_Tensors, int, _Tensors, int]

    def describes(self, module: nn.Module) -> bool:
        """Whether the module has no hooks and is made of the same; its tensors may be others."""
        attributes = vars(module)
        if type(module) is not self.kind or len(attributes) != self.size:
            return False
        values = self.read(attributes)
        parameters, num_parameters, buffers, num_buffers = self.tensors
        return (
            # Classes first: a number that became a tensor must not be compared.
            tuple(map(type, values)) == self.kinds
            and values[: len(self.plain)] == self.plain
            and list(attributes["_modules"].items()) == self.children
            and attributes["_parameters"] is parameters
            and len(parameters) == num_parameters
            and attributes["_buffers"] is buffers
            and len(buffers) == num_buffers
            and not any(_hooks_of(attributes))
        )


def _part(module: nn.Module) -> _Part:
    attributes = vars(module)
    names = [name for name in attributes if name not in _OF_ANY_MODULE]
    names.sort(key=lambda name: not isinstance(attributes[name], _COMPARED))
    values = tuple(attributes[name] for name in names)
    parameters, buffers = attributes["_parameters"], attributes["_buffers"]
    return _Part(
        type(module),
        len(attributes),
        # Every module has one attribute at least; of one, `itemgetter` would give no tuple.
        operator.itemgetter(*names, names[0]),
        tuple(value for value in values if isinstance(value, _COMPARED)),
        (*map(type, values), type(values[0])),
        list(module._modules.items()),
        (parameters, len(parameters), buffers, len(buffers)),
    )


class ModuleWatch:
    """The state of a module, collected again only after a change.

    Comparing what the module is made of with what it was takes a fraction of the time.

    Args:
        packages: see `why_module_not_captured`.
    """

    def __init__(self, packages: tuple[str, ...]) -> None:
        self._packages = packages
        self._module: weakref.ref[nn.Module] | None = None  # it may own this watch
        self._part: _Part | None = None
        self._inside: list[tuple[nn.Module, _Part]] = []
        self._tensors: list[tuple[_Tensors, str, Tensor | None]] = []
        self._state: ModuleState | None = None

    def __getstate__(self) -> dict[str, Any]:
        # It is about these objects: a copy watches others.
        return vars(ModuleWatch(self._packages))

    def state(self, module: nn.Module) -> ModuleState:
        """The present state of a module."""
        if self._state is not None and self._is_unchanged(module):
            return self._state
        if why_not := why_module_not_captured(module, self._packages):
            self._state = None
            return ModuleState(why_not, (), {})
        self._state = self._collect(module)
        return self._state

    def _is_unchanged(self, module: nn.Module) -> bool:
        if self._module is None or self._module() is not module or self._part is None:
            return False
        if nn.modules.module._has_any_global_hook():
            return False
        try:
            return (
                self._part.describes(module)
                and all(part.describes(inside) for inside, part in self._inside)
                and all(there[name] is tensor for there, name, tensor in self._tensors)
            )
        except KeyError:  # an attribute is gone
            return False

    def _collect(self, module: nn.Module) -> ModuleState:
        parts = [(part, _part(part)) for part in _parts(module)]
        self._module, self._part, self._inside = weakref.ref(module), parts[0][1], parts[1:]
        self._tensors = [
            (there, name, tensor)
            for _, part in parts
            for there in (part.tensors[0], part.tensors[2])
            for name, tensor in there.items()
        ]
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return ModuleState(None, settings(module), tensors)


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
