"""Which backend of an operator runs: one registry, one rule, one override.

An operator is a folder of `hpgr_plugin.ops` whose backends are modules of that folder. Each backend
module has a function of the operator's name, and one for each further function of the operator. It
may have `why_not(*arguments) -> str | None`, the reason why it cannot run these arguments, or
`why_not_<function>` where functions differ in that. `python -m hpgr_plugin.ops` prints which
backends this machine can use.

The `__init__.py` of an operator's folder must not use the name `torch` or `triton`: importing the
backend of that name replaces it there.

The rule: the first backend, in the order of registration, that is usable. `HPGR_BACKENDS` in the
environment, or `hpgr.set_backends.choices` in gin, names another one by operator:
`HPGR_BACKENDS="hstu_attention=torch,preference_plan=naive"`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pkgutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

ENVIRONMENT_VARIABLE = "HPGR_BACKENDS"

Check = Callable[..., str | None]

_OPERATORS: dict[str, Operator] = {}
_CHOICES: dict[str, str] = {}


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    Attributes:
        name: "naive", "torch", "triton" or "fbgemm".
        module: where it is, imported on first use.
        here: returns the reason why it cannot run on this machine at all, or None.
        automatic: False for a backend that runs only when it is named, such as the reference.
        warns: whether a fallback from it on CUDA tensors is reported, once per reason.
    """

    name: str
    module: str
    here: Callable[[], str | None] = lambda: None
    automatic: bool = True
    warns: bool = True


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
        self._loaded: dict[tuple[str, str], tuple[ModuleType, Check | None]] = {}
        _OPERATORS[name] = self

    def __call__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        """Run the function of the operator's own name, see `run`."""
        return self.run(self.name, *args, backend=backend, **kwargs)

    def run(self, function: str, /, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        """Run a function of the chosen backend.

        Args:
            function: its name in every backend's module.
            backend: names a backend for this call; None follows the rule above.
            args, kwargs: of the function.

        Raises:
            ValueError: an unknown backend, or a named one that cannot run these arguments.
        """
        module, _ = self._load(self._choose(function, backend, args, kwargs), function)
        return getattr(module, function)(*args, **kwargs)

    def chosen(self, *args: Any, **kwargs: Any) -> str:
        """The name of the backend that a call with these arguments would run.

        Raises:
            ValueError: as in `run`.
        """
        return self._choose(self.name, None, args, kwargs).name

    def why_not(
        self, backend: str, /, *args: Any, function: str | None = None, **kwargs: Any
    ) -> str | None:
        """Why `backend` cannot run these arguments on this machine, or None if it can."""
        entry = self.backends[backend]
        reason = entry.here()
        if reason is None and backend == "triton" and not interpreted():
            reason = _off_cuda(args, kwargs)
        if reason is not None:
            return reason
        check = self._load(entry, function or self.name)[1]
        return None if check is None else check(*args, **kwargs)

    def _load(self, backend: Backend, function: str) -> tuple[ModuleType, Check | None]:
        """The backend's module, and what says why it cannot run some arguments."""
        key = backend.name, function
        if key not in self._loaded:
            module = importlib.import_module(backend.module)
            check = getattr(module, f"why_not_{function}", None)
            self._loaded[key] = module, check or getattr(module, "why_not", None)
        return self._loaded[key]

    def _choose(self, function: str, named: str | None, args: Any, kwargs: Any) -> Backend:
        if named is None:
            named = backend_choices().get(self.name)
        if named is not None:
            if named not in self.backends:
                raise ValueError(f"{self.name} has backends {list(self.backends)}, got {named!r}")
            reason = self.why_not(named, *args, function=function, **kwargs)
            if reason is not None:
                raise ValueError(f"{self.name}: backend {named!r} cannot run here: {reason}")
            return self.backends[named]
        refused: dict[str, str] = {}
        for name, backend in self.backends.items():
            if not backend.automatic:
                continue
            # The interpreter is for tests: kernels run on CPU tensors only when they are named.
            reason = _off_cuda(args, kwargs) if name == "triton" else None
            reason = reason or self.why_not(name, *args, function=function, **kwargs)
            if reason is None:
                self._report(name, refused, args, kwargs)
                return backend
            refused[name] = reason
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise ValueError(f"no backend of {self.name} can run here: {reasons}")

    def _report(self, chosen: str, refused: dict[str, str], args: Any, kwargs: Any) -> None:
        """Warn once where CUDA tensors fall back to a slower backend."""
        told = [f"{name}: {why}" for name, why in refused.items() if self.backends[name].warns]
        if told and _on_cuda(args, kwargs):
            _warn_once(f"{self.name} runs on backend {chosen!r}: {'; '.join(told)}")


def triton_operator(package: str) -> Operator:
    """The operator of a folder of `hpgr_plugin.ops` with backends triton, torch and naive.

    Args:
        package: `__name__` of the folder.
    """
    return Operator(
        package.rpartition(".")[2],
        Backend("triton", f"{package}.triton", here=triton_here),
        Backend("torch", f"{package}.torch"),
        Backend("naive", f"{package}.naive", automatic=False),
    )


def operators() -> Mapping[str, Operator]:
    """Every operator by name."""
    return dict(_OPERATORS)


def set_backends(choices: Mapping[str, str] | None = None) -> None:
    """Name the backend of some operators for this process; `HPGR_BACKENDS` takes precedence.

    Args:
        choices: operator name -> backend name; None or empty goes back to the automatic choice.

    Raises:
        ValueError: there is no operator of a name.
    """
    chosen = dict(choices or {})
    _check_operators("choices", chosen)
    _CHOICES.clear()
    _CHOICES.update(chosen)


def backend_choices() -> dict[str, str]:
    """The named backends by operator.

    Raises:
        ValueError: `HPGR_BACKENDS` is not a list of operator=backend, or an operator is unknown.
    """
    text = os.environ.get(ENVIRONMENT_VARIABLE, "")
    return _CHOICES | _parse(text) if text else _CHOICES


@functools.cache
def _parse(text: str) -> dict[str, str]:
    choices = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        operator, _, backend = (word.strip() for word in part.partition("="))
        if not operator or not backend:
            raise ValueError(f"{ENVIRONMENT_VARIABLE} must be operator=backend,..., got {text!r}")
        choices[operator] = backend
    _check_operators(ENVIRONMENT_VARIABLE, choices)
    return choices


def _check_operators(name: str, choices: Mapping[str, str]) -> None:
    """Operators are registered when they are imported; their folders say which there are."""
    folders = pkgutil.iter_modules([str(Path(__file__).parent)])
    known = sorted(folder.name for folder in folders if folder.ispkg)
    unknown = sorted(choices.keys() - known)
    if unknown:
        raise ValueError(f"{name} must name operators among {known}, got {unknown}")


def triton_here() -> str | None:
    """Why no Triton kernel can run on this machine, or None; Triton is not imported to find out."""
    return _triton_here(interpreted())


@functools.cache
def _triton_here(in_interpreter: bool) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and not in_interpreter:
        return "there is no CUDA device (TRITON_INTERPRET=1 runs the kernels slowly on a CPU)"
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter instead of on a GPU, as in tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def dot_precision(dtype: torch.dtype, device: torch.device) -> str:
    """Triton's `input_precision` for products of this dtype, following torch's own setting."""
    if dtype != torch.float32 or device.type != "cuda":
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def product_dtype(factor: Tensor) -> torch.dtype:
    """The dtype of matrix products with this tensor: autocast's where it is on."""
    if torch.is_autocast_enabled(factor.device.type):
        return torch.get_autocast_dtype(factor.device.type)
    return factor.dtype


@functools.cache
def _warn_once(message: str) -> None:
    """Warn the first time in this process, independent of the warning filters."""
    warnings.warn(message, stacklevel=4)


def _off_cuda(args: Any, kwargs: Any) -> str | None:
    return None if _on_cuda(args, kwargs) else "the tensors are not on a CUDA device"


def _on_cuda(args: Any, kwargs: Any) -> bool:
    """Whether the first tensor of the arguments, also inside tuples and dataclasses, is on CUDA."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value.is_cuda
        if is_dataclass(value):
            value = tuple(vars(value).values())
        if isinstance(value, tuple) and any(isinstance(x, Tensor) for x in value):
            return _on_cuda(value, {})
    return False
