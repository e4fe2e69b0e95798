"""Slot attention: every backend computes the definition."""

import triton_device  # noqa: F401, I001  the interpreter is chosen before Triton is imported

import pytest
import torch
from triton_device import DEVICE

from hpgr_plugin.ops.slot_attention import Settings, SlotBias, Slots, slot_attention

ALPHA, LENGTH, BUCKETS = 0.4, 50.0, 12


def problem(
    count: int, near: int, slots: int, *, rows: int = 40, heads: int = 2, size: int = 24
) -> tuple[tuple, tuple, Slots, SlotBias]:
    table = torch.randn(BUCKETS)
    new = torch.randn(count, 4 * heads * size).chunk(4, 1)[1:]  # not contiguous, as in a layer
    kept = torch.randn(heads, rows, size), torch.randn(heads, rows, size)
    shared = torch.arange(rows - near, rows)
    order = torch.rand(count, rows - near).argsort(1)[:, :slots]
    weights = torch.rand(count, slots) * (torch.rand(count, slots) < 0.7)
    index = torch.where(weights > 0, order, 0)
    bias = SlotBias(
        table,
        3,
        torch.randint(0, BUCKETS, (1 if slots % 2 else count, near)),
        torch.randint(0, BUCKETS, (count, slots)),
    )
    return new, kept, Slots(shared, index, weights, rows, heads), bias


def moved(value: object) -> object:
    """Tensors, also inside tuples and the classes of the operator, on the device of the tests."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if isinstance(value, tuple):
        return tuple(map(moved, value))
    if isinstance(value, Slots | SlotBias):
        return type(value)(**{name: moved(part) for name, part in vars(value).items()})
    return value


@pytest.mark.parametrize("mask_position", ["post", "pre"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("count", "near", "slots"), [(5, 3, 7), (3, 0, 4), (4, 35, 0), (1, 5, 33)])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_backends_compute_the_definition(
    backend: str, count: int, near: int, slots: int, biased: bool, mask_position: str
) -> None:
    new, kept, kept_slots, bias = problem(count, near, slots)
    settings = Settings(ALPHA, LENGTH, mask_position)  # type: ignore[arg-type]
    given = new, kept, kept_slots, bias if biased else None, settings
    wanted = slot_attention(*given, backend="naive")
    got = slot_attention(*map(moved, given), backend=backend)  # type: ignore[arg-type]
    torch.testing.assert_close(got.cpu(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_candidates(backend: str) -> None:
    new, kept, slots, bias = problem(0, 3, 4)
    given = map(moved, (new, kept, slots, bias, Settings(ALPHA, LENGTH)))
    assert slot_attention(*given, backend=backend).shape == (0, 48)  # type: ignore[arg-type]


def test_dense_weights_are_those_of_the_slots() -> None:
    _, _, slots, _ = problem(5, 3, 7)
    dense = slots.dense()
    assert dense[:, slots.near].eq(1).all()
    filled = slots.weights > 0
    torch.testing.assert_close(dense.gather(1, slots.index)[filled], slots.weights[filled])
    assert int((dense > 0).sum()) == int(filled.sum()) + 5 * 3


def test_heads_that_are_too_wide_are_refused_by_the_kernel() -> None:
    new, kept, slots, bias = problem(2, 1, 1, size=300, heads=1)
    given = map(moved, (new, kept, slots, bias, Settings(ALPHA, LENGTH)))
    with pytest.raises(ValueError, match="more than 256"):
        slot_attention(*given, backend="triton")  # type: ignore[arg-type]
