"""Which modules and passes are left to Python, and which settings a graph depends on."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hpgr_plugin.components.capture_checks import (
    settings,
    state_of_torch,
    why_module_not_captured,
    why_pass_not_captured,
)
from hpgr_plugin.components.sem import SessionEnhancementModule


class _Watching(TorchDispatchMode):
    """Sees every operation, as a counter of operations does."""

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def model() -> nn.Sequential:
    sem = SessionEnhancementModule(embedding_dim=8, num_heads=2, causal=True)
    return nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.Sequential(nn.SiLU(), sem))


def why(module: nn.Module) -> str | None:
    return why_module_not_captured(module, ("hpgr_plugin.",))


class Own(nn.Linear):
    """Of another package."""


def add_hook(method: str) -> Callable[[Any], Any]:
    return lambda built: getattr(built[2][0], method)(lambda *_: None)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "forward hook": (add_hook("register_forward_hook"), "'2.0' of Sequential has hooks"),
    "forward pre-hook": (add_hook("register_forward_pre_hook"), "has hooks"),
    "backward hook": (add_hook("register_full_backward_hook"), "has hooks"),
    "backward pre-hook": (add_hook("register_full_backward_pre_hook"), "has hooks"),
    "root hook": (lambda m: m.register_forward_hook(lambda *_: None), "^Sequential has hooks"),
    "own class": (lambda m: m.append(Own(8, 8)), r"'3' of Sequential is of class \S+\.Own"),
    "spectral norm": (lambda m: nn.utils.parametrizations.spectral_norm(m[0]), "is of class"),
    "forward": (lambda m: setattr(m[0], "forward", lambda x: x), "another forward"),
    "compiled": (lambda m: m[0].compile(), "another forward"),
    "batch norm": (lambda m: m.append(nn.BatchNorm1d(8)), "statistics over all rows"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_modules_whose_code_does_more_are_named(change: str) -> None:
    built = model()
    assert why(built) is None
    apply, message = CHANGES[change]
    apply(built)
    reason = why(built)
    assert reason is not None
    assert re.search(message, reason), reason


def test_a_removed_hook_and_a_global_one() -> None:
    built = model()
    built[0].register_forward_hook(lambda *_: None).remove()
    assert why(built) is None
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert why(built) == "a global module hook is registered"
    finally:
        handle.remove()


def test_settings_change_with_modes_rates_classes_and_choices() -> None:
    built = model()
    seen = [settings(built)]
    assert settings(copy.deepcopy(built)) == seen[0]
    built[1].p = 0.3
    seen.append(settings(built))
    built[1].eval()
    seen.append(settings(built))
    built[2][1].pooling = "mean"
    seen.append(settings(built))
    built[2][0] = nn.Tanh()
    seen.append(settings(built))
    assert len(set(seen)) == len(seen)


def test_autocast_and_determinism_are_part_of_the_state() -> None:
    states = [state_of_torch()]
    dtype = torch.get_autocast_dtype("cuda")
    try:
        torch.set_autocast_enabled("cuda", True)
        states.append(state_of_torch())
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        states.append(state_of_torch())
        torch.use_deterministic_algorithms(True)
        states.append(state_of_torch())
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", dtype)
        torch.use_deterministic_algorithms(False)
    assert len(set(states)) == 4
    assert state_of_torch() == states[0]


def seen_inside(reentrant: bool) -> list[str | None]:
    reasons = []

    def function(x: Tensor) -> Tensor:
        reasons.append(why_pass_not_captured() if torch.is_grad_enabled() else "no gradient")
        return x.sin()

    x = torch.ones(3, requires_grad=True)
    checkpoint(function, x, use_reentrant=reentrant).sum().backward()
    return reasons


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_passes_are_found_in_both_directions(reentrant: bool) -> None:
    reasons = seen_inside(reentrant)
    assert len(reasons) == 2
    assert all(reasons), reasons


def test_modes_of_torch_are_found_while_they_last() -> None:
    assert why_pass_not_captured() is None
    with torch.autograd.graph.save_on_cpu():
        assert why_pass_not_captured() == "hooks on saved tensors are on, as in checkpointing"
    with torch.autograd.set_detect_anomaly(True):
        assert why_pass_not_captured() == "anomaly detection is on"
    with _Watching():
        assert why_pass_not_captured() == "a dispatch mode is on"
    assert why_pass_not_captured() is None
