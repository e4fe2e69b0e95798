"""Fixtures of the operators' tests: the choice of a backend, and memory that starts as NaN."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hpgr_plugin.ops.dispatch import set_backends


@pytest.fixture
def use_backends() -> Iterator[Callable[..., None]]:
    """`use_backends(operator="backend", ...)`, until the end of the test."""
    yield lambda **choices: set_backends(choices)
    set_backends()


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated without a value holds NaN, so reading it before it is written shows."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_nan(*args: Any, **kwargs: Any) -> Tensor:
            x = allocate(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return allocate_nan

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
