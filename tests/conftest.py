"""Fixtures shared by all tests: seeding, and jagged shapes with their edges."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

Offsets = Callable[..., Tensor]

JAGGED_LENGTHS = {
    "random": [5, 2, 9, 1, 7],
    "empty-rows": [0, 4, 0, 0, 3, 0],
    "one-item": [1],
    "all-empty": [0, 0, 0],
    "no-rows": [],
    "one-long-row": [1, 60, 0],
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=JAGGED_LENGTHS.values(), ids=JAGGED_LENGTHS.keys())
def lengths(request: pytest.FixtureRequest) -> list[int]:
    """Row lengths of one jagged tensor, the edges included."""
    return list(request.param)


@pytest.fixture
def offsets_of() -> Offsets:
    """`offsets_of(lengths, dtype=torch.int64) -> [B + 1]`."""

    def build(lengths: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        ends = torch.tensor(lengths, dtype=dtype).cumsum(0, dtype=dtype)
        return torch.cat([torch.zeros(1, dtype=dtype), ends])

    return build


@pytest.fixture
def sorted_times() -> Callable[[Sequence[int], int], Tensor]:
    """`sorted_times(lengths, bound) -> [T]` int64: ascending in every row, ties among them."""

    def build(lengths: Sequence[int], bound: int) -> Tensor:
        rows = [torch.randint(0, bound, (n,)).sort().values for n in lengths]
        return torch.cat([torch.empty(0, dtype=torch.int64), *rows])

    return build
