"""Which modules and passes are left to Python, and which settings a graph depends on."""

import copy
import gc
import pickle
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hpgr_plugin.components.capture_checks import (
    ModuleState,
    ModuleWatch,
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
    "traced": (lambda m: m.append(torch.jit.trace(nn.Tanh(), torch.ones(8))), "is of class"),
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


def found(built: nn.Module) -> ModuleState:
    """The state of a module, by a watch that has seen nothing."""
    return ModuleWatch(("hpgr_plugin.",)).state(built)


def same(one: ModuleState, other: ModuleState) -> bool:
    tensors = [list(state.tensors.items()) for state in (one, other)]
    return (
        one[:2] == other[:2]
        and [name for name, _ in tensors[0]] == [name for name, _ in tensors[1]]
        and all(a is b for (_, a), (_, b) in zip(*tensors, strict=True))
    )


def rename_weight(built: Any) -> None:
    built[0].kernel = built[0]._parameters.pop("weight")


QUIET_CHANGES: dict[str, Callable[[Any], Any]] = {
    "rate": lambda m: setattr(m[1], "p", 0.3),
    "mode": lambda m: m[2].eval(),
    "a number that was None": lambda m: setattr(m[0], "limit", 3),
    "None that was a number": lambda m: setattr(m[0], "in_features", None),
    "a tensor that was a number": lambda m: setattr(m[1], "p", torch.tensor([0.1, 0.1])),
    "an attribute less": lambda m: delattr(m[1], "inplace"),
    "an attribute in place of another": lambda m: (
        delattr(m[1], "inplace"),
        setattr(m[1], "other", 1),
    ),
    "an attribute more": lambda m: setattr(m[1], "other", 1),
    "class": lambda m: setattr(m[1], "__class__", nn.Dropout1d),
    "module": lambda m: m.__setitem__(1, nn.Tanh()),
    "module more": lambda m: m.append(nn.Tanh()),
    "module less": lambda m: m.__delitem__(1),
    "modules in another order": lambda m: m._modules.update(
        {"0": m._modules["1"], "1": m._modules["0"]}
    ),
    "the same modules in another order": lambda m: m._modules.update({"0": m._modules.pop("0")}),
    "parameter": lambda m: setattr(m[0], "weight", nn.Parameter(torch.zeros(8, 8))),
    "parameter more": lambda m: m[1].register_parameter("w", nn.Parameter(torch.zeros(8))),
    "parameter less": lambda m: m[0].register_parameter("bias", None),
    "parameter renamed": rename_weight,
    "buffer more": lambda m: m[1].register_buffer("b", torch.zeros(8)),
}


@pytest.mark.parametrize("change", QUIET_CHANGES)
def test_a_watch_notices_what_changes_the_state(change: str) -> None:
    built, watch = model(), ModuleWatch(("hpgr_plugin.",))
    built[0].limit = None
    before = watch.state(built)
    assert watch.state(built) is before
    assert same(before, found(built))
    QUIET_CHANGES[change](built)
    after = watch.state(built)
    assert not same(after, before)
    assert same(after, found(built))
    assert watch.state(built) is after


@pytest.mark.parametrize("change", CHANGES)
def test_a_watch_notices_what_keeps_a_module_from_graphs(change: str) -> None:
    built, watch = model(), ModuleWatch(("hpgr_plugin.",))
    assert watch.state(built).why_not is None
    CHANGES[change][0](built)
    reason = watch.state(built).why_not
    assert reason is not None
    assert re.search(CHANGES[change][1], reason), reason
    assert watch.state(built).why_not == reason


def test_a_watch_notices_global_hooks_and_removed_ones() -> None:
    built, watch = model(), ModuleWatch(("hpgr_plugin.",))
    assert watch.state(built).why_not is None
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert watch.state(built).why_not == "a global module hook is registered"
    finally:
        handle.remove()
    assert watch.state(built).why_not is None
    built[0]._forward_hooks = type(built[0]._forward_hooks)()  # another dict of hooks
    built[0].register_forward_hook(lambda *_: None)
    assert watch.state(built).why_not is not None


def test_copies_of_a_watch_are_about_copies_of_the_module() -> None:
    built, watch = model(), ModuleWatch(("hpgr_plugin.",))
    built.watch = watch
    watch.state(built)
    for copied in (copy.deepcopy(built), pickle.loads(pickle.dumps(built))):
        state = copied.watch.state(copied)
        assert same(state, found(copied))
        assert state.tensors["0.weight"] is copied[0].weight
        copied[2].eval()
        assert not same(copied.watch.state(copied), state)
    assert same(watch.state(built), found(built))


def test_a_watch_that_a_module_owns_does_not_keep_it() -> None:
    built = model()
    built.watch = ModuleWatch(("hpgr_plugin.",))
    built.watch.state(built)
    alive = weakref.ref(built[0].weight)
    gc.disable()
    try:
        del built
        assert alive() is None
    finally:
        gc.enable()


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


@pytest.fixture
def no_anomaly_detection() -> Iterator[None]:
    """Off for a test: the host's research trainer leaves it on for the whole process."""
    before = torch.is_anomaly_enabled()
    torch.autograd.set_detect_anomaly(False)
    yield
    torch.autograd.set_detect_anomaly(before)


@pytest.mark.usefixtures("no_anomaly_detection")
def test_modes_of_torch_are_found_while_they_last() -> None:
    assert why_pass_not_captured() is None
    with torch.autograd.graph.save_on_cpu():
        assert why_pass_not_captured() == "hooks on saved tensors are on, as in checkpointing"
    with torch.autograd.set_detect_anomaly(True):
        assert why_pass_not_captured() == "anomaly detection is on"
    with _Watching():
        assert why_pass_not_captured() == "a dispatch mode is on"
    assert why_pass_not_captured() is None
