"""Which backend of an operator runs: one registry, one rule, one override.

An operator is a folder of `hpgr_plugin.ops` whose backends are modules of that folder. Each backend
module has a function of the operator's name, and may have `why_not(*arguments) -> str | None`: why
it cannot run these arguments. `python -m hpgr_plugin.ops` prints what is usable on this machine.

The rule: the first backend, in the order of registration, that is usable. `HPGR_BACKENDS` in the
environment, or `hpgr.set_backends.choices` in gin, names another one by operator:
`HPGR_BACKENDS="hstu_attention=torch,preference_plan=naive"`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ENVIRONMENT_VARIABLE = "HPGR_BACKENDS"

_OPERATORS: dict[str, Operator] = {}
_CHOICES: dict[str, str] = {}


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    Attributes:
        name: "naive", "torch", "triton" or "fbgemm".
        module: where it is, imported on first use.
        here: why it cannot run on this machine at all, or None.
        automatic: False for a backend that runs only when it is named, such as the reference.
    """

    name: str
    module: str
    here: Callable[[], str | None] = lambda: None
    automatic: bool = True


class Operator:
    """An operator and its backends, registered under its name.

    Args:
        name: of the operator, and of the function in every backend's module.
        backends: the fastest first.

    Raises:
        ValueError: the name is taken, or two backends share one.
    """

    def __init__(self, name: str, *backends: Backend) -> None:
        names = [backend.name for backend in backends]
        if name in _OPERATORS:
            raise ValueError(f"operator {name!r} is registered already")
        if len(set(names)) != len(names):
            raise ValueError(f"operator {name!r} has two backends of one name: {names}")
        self.name = name
        self.backends = {backend.name: backend for backend in backends}
        _OPERATORS[name] = self

    def __call__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        """Run the chosen backend; `backend` names one for this call.

        Raises:
            ValueError: an unknown backend, or a named one that cannot run these arguments.
        """
        function = self._function(self._choose(backend, args, kwargs))
        return function(*args, **kwargs)

    def why_not(self, backend: str, *args: Any, **kwargs: Any) -> str | None:
        """Why `backend` cannot run these arguments on this machine, or None if it can."""
        entry = self.backends[backend]
        reason = entry.here()
        if reason is not None:
            return reason
        check = getattr(importlib.import_module(entry.module), "why_not", None)
        answer: str | None = None if check is None else check(*args, **kwargs)
        return answer

    def _choose(self, named: str | None, args: Any, kwargs: Any) -> Backend:
        named = named or backend_choices().get(self.name)
        if named is not None:
            if named not in self.backends:
                raise ValueError(f"{self.name} has backends {list(self.backends)}, got {named!r}")
            reason = self.why_not(named, *args, **kwargs)
            if reason is not None:
                raise ValueError(f"{self.name}: backend {named!r} cannot run here: {reason}")
            return self.backends[named]
        refused: list[str] = []
        for name, backend in self.backends.items():
            if not backend.automatic:
                continue
            reason = _not_automatic(name, args, kwargs) or self.why_not(name, *args, **kwargs)
            if reason is None:
                if refused and _on_cuda(args, kwargs):
                    warn_once(f"{self.name} runs on backend {name!r}: {'; '.join(refused)}")
                return backend
            refused.append(f"{name}: {reason}")
        raise ValueError(f"no backend of {self.name} can run here: {'; '.join(refused)}")

    def _function(self, backend: Backend) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(importlib.import_module(backend.module), self.name)
        return function


def operators() -> Mapping[str, Operator]:
    """Every operator by name."""
    return dict(_OPERATORS)


def set_backends(choices: Mapping[str, str] | None = None) -> None:
    """Name the backend of some operators for this process; the environment has the last word.

    Args:
        choices: operator name -> backend name; None or empty goes back to the automatic choice.
    """
    _CHOICES.clear()
    _CHOICES.update(choices or {})


def backend_choices() -> dict[str, str]:
    """The named backends by operator.

    Raises:
        ValueError: `HPGR_BACKENDS` is not a list of operator=backend.
    """
    text = os.environ.get(ENVIRONMENT_VARIABLE, "")
    choices = dict(_CHOICES)
    for part in filter(None, (part.strip() for part in text.split(","))):
        operator, equals, backend = part.partition("=")
        if not equals or not operator or not backend:
            raise ValueError(f"{ENVIRONMENT_VARIABLE} is operator=backend,..., got {text!r}")
        choices[operator.strip()] = backend.strip()
    return choices


def triton_here() -> str | None:
    """Why no Triton kernel can run on this machine, or None."""
    if not triton_is_installed():
        return "triton is not installed"
    if not torch.cuda.is_available() and not interpreted():
        return "there is no CUDA device (TRITON_INTERPRET=1 runs the kernels slowly on a CPU)"
    return None


@functools.cache
def triton_is_installed() -> bool:
    """Whether Triton can be imported; it is not imported to find out."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU, as tests ask for."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def dot_precision(dtype: torch.dtype, device: torch.device) -> str:
    """Triton's `input_precision` for products of this dtype, following torch's own setting."""
    if dtype != torch.float32 or device.type != "cuda":
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def warn_once(message: str) -> None:
    """Warn the first time in this process, whatever the warning filters keep."""
    _warn_cached(message)


@functools.cache
def _warn_cached(message: str) -> None:
    warnings.warn(message, stacklevel=5)


def _not_automatic(name: str, args: Any, kwargs: Any) -> str | None:
    """The interpreter is for tests: kernels run on CPU tensors only when they are named."""
    if name == "triton" and not _on_cuda(args, kwargs):
        return "the tensors are not on a CUDA device"
    return None


def _on_cuda(args: Any, kwargs: Any) -> bool:
    """Whether the first tensor among the arguments (tuples looked through) is on CUDA."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value.is_cuda
        if isinstance(value, tuple) and any(isinstance(x, Tensor) for x in value):
            return _on_cuda(value, {})
    return False
