"""Collectives over the default process group, on rows; a single process needs no group."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of `value` over all processes, without gradient."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def largest_over_processes(value: Tensor) -> Tensor:
    """The largest of `value` over all processes, element by element, without gradient."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def stack_over_processes(value: Tensor) -> Tensor:
    """`[W, ...]`: the values of all processes, of one shape, without gradient."""
    if world_size() == 1:
        return value.detach().unsqueeze(0)
    gathered = value.new_empty((world_size(), *value.shape))
    if value.numel():
        _all_gather()(gathered.flatten(0, 1) if value.dim() else gathered, value.contiguous())
    return gathered


def row_counts(rows: Tensor) -> list[int]:
    """How many rows every process has."""
    if world_size() == 1:
        return [len(rows)]
    own = torch.tensor([len(rows)], device=rows.device)
    counts: list[int] = stack_over_processes(own).flatten().tolist()
    return counts


def gather_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """`[W, max(counts), ...]`: the rows of all processes, zeros after their own; no gradient."""
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows.detach()
    return stack_over_processes(padded)


def scatter_sum(values: Tensor) -> Tensor:
    """From `[W, M, ...]`, the sum over processes of what they hold for this one, `[M, ...]`."""
    if world_size() == 1:
        return values[0]
    own = torch.empty_like(values[0])
    if own.numel():
        _reduce_scatter()(own, values.flatten(0, 1))
    return own


def exchange_counts(counts: Tensor) -> Tensor:
    """`[W]` numbers for every process become the `[W]` numbers of every process for this one."""
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts)
    return received


def exchange_rows(rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
    """All-to-all of rows, with gradient.

    Args:
        rows: `[sum(send), ...]`, those for the first process first.
        send: rows for every process.
        receive: rows from every process.

    Returns:
        `[sum(receive), ...]`, those of the first process first. Its gradient goes back the same
        way, as a sum: nothing is divided by the number of processes.
    """
    exchanged: Tensor = _ExchangeRows.apply(rows, send, receive)
    return exchanged


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        ctx.splits = send, receive
        return _exchange(rows, send, receive)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        send, receive = ctx.splits
        return _exchange(grad, receive, send), None, None


def _exchange(rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
    received = rows.new_empty((sum(receive), *rows.shape[1:]))
    dist.all_to_all_single(received, rows.contiguous(), receive, send)
    return received


@functools.cache
def _all_gather() -> Callable[[Tensor, Tensor], object]:
    """Newer torch has another name for it."""
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@functools.cache
def _reduce_scatter() -> Callable[[Tensor, Tensor], object]:
    return getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
