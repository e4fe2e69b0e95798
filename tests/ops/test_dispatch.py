"""The registry of operators: the listing, and who chooses a backend."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hpgr_plugin.ops import dispatch
from hpgr_plugin.ops.dispatch import ENVIRONMENT_VARIABLE, Backend, Operator
from hpgr_plugin.ops.preference_plan import plan_preferences
from hpgr_plugin.ops.preference_plan import torch as torch_plan

ROOT = Path(__file__).parents[2]
ONE = torch.ones(1, 1)
ARGUMENTS = (ONE, ONE, torch.tensor([0, 1]), torch.tensor([0, 1]))


def listing(**environment: str) -> dict[tuple[str, str], str]:
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    done = subprocess.run(
        [sys.executable, "-m", "hpgr_plugin.ops"],
        cwd=ROOT, env=variables, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    rows = [line.split(maxsplit=2) for line in done.stdout.splitlines()[1:]]
    return {(operator, backend): answer for operator, backend, answer in rows}


def test_every_operator_lists_its_backends_and_why_one_is_not_usable() -> None:
    usable = listing(CUDA_VISIBLE_DEVICES="")
    for name in ("hstu_attention", "hstu_layer", "item_softmax", "preference_plan",
                 "session_pool", "compact"):  # fmt: skip
        assert usable[name, "torch"] == "yes"
        assert usable[name, "naive"] == "yes, when named"
        assert usable[name, "triton"].startswith("no: ")
    assert usable["jagged", "torch"] == "yes"
    assert ("jagged", "fbgemm") in usable


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with every plan that the torch backend makes."""
    made: list[str] = []
    original = torch_plan.plan_preferences
    monkeypatch.setattr(
        torch_plan, "plan_preferences", lambda *a: made.append("torch") or original(*a)
    )
    return made


def test_the_environment_goes_before_set_backends(
    calls: list[str], use_backends: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_preferences(*ARGUMENTS)
    assert len(calls) == 1
    use_backends(preference_plan="naive")
    plan_preferences(*ARGUMENTS)
    assert len(calls) == 1
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, " preference_plan = torch, jagged=torch")
    plan_preferences(*ARGUMENTS)
    assert len(calls) == 2
    plan_preferences(*ARGUMENTS, backend="naive")
    assert len(calls) == 2


def test_unknown_names_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"preference_plan has backends .*, got 'cuda'"):
        plan_preferences(*ARGUMENTS, backend="cuda")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "preference_plan")
    with pytest.raises(ValueError, match=r"must be operator=backend,\.\.\., got 'preference_plan'"):
        plan_preferences(*ARGUMENTS)


def test_a_named_backend_that_cannot_run_gives_its_reason() -> None:
    doubles = (ONE.double(), ONE.double(), *ARGUMENTS[2:])
    with pytest.raises(ValueError, match=r"'triton' cannot run here: .+"):
        plan_preferences(*doubles, backend="triton")


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> Operator:
    monkeypatch.setattr(dispatch, "_OPERATORS", {})
    return Operator(
        "check_sorted",
        Backend("triton", "no.such.module"),
        Backend("torch", "hpgr_plugin.ops.jagged.segments"),
    )


def test_a_fallback_on_cuda_is_reported_once(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator, "why_not", lambda name, *_, **__: {"triton": "too old"}.get(name))
    monkeypatch.setattr(dispatch, "_on_cuda", lambda *_: True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            operator(torch.arange(3), torch.tensor([0, 3]), "times")
    told = [str(warning.message) for warning in caught]
    assert told == ["check_sorted runs on backend 'torch': triton: too old"]


def test_kernels_run_on_cpu_tensors_only_when_named(operator: Operator) -> None:
    operator(torch.arange(3), torch.tensor([0, 3]), "times")  # "no.such.module" is not imported
    with pytest.raises(ModuleNotFoundError if dispatch.interpreted() else ValueError):
        operator(torch.arange(3), torch.tensor([0, 3]), "times", backend="triton")


def test_two_of_one_name_are_an_error(operator: Operator) -> None:
    with pytest.raises(ValueError, match="'check_sorted' is registered already"):
        Operator("check_sorted", Backend("torch", "x"))
    with pytest.raises(ValueError, match="two backends of one name"):
        Operator("other", Backend("torch", "x"), Backend("torch", "y"))
