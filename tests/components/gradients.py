"""Compares a module with its reference: values, and gradients by all inputs."""

from collections.abc import Sequence

import torch
from torch import Tensor


def assert_same(
    fast: Tensor, slow: Tensor, inputs: Sequence[Tensor], *, value_atol: float, rtol: float
) -> None:
    """Both outputs are equal, and so are their gradients under the same random weights."""
    torch.testing.assert_close(fast, slow, rtol=0, atol=value_atol)
    weights = torch.randn_like(fast)
    gradients = [torch.autograd.grad((x * weights).sum(), inputs) for x in (fast, slow)]
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=rtol, atol=rtol / 10)
