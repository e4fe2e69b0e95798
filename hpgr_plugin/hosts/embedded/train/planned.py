"""Batches with their plans: made on the host, ahead of the step, and moved at once.

What is masked, the sessions and the padding of the attention have sizes that depend on the data,
and so has what is checked of a batch. On a CUDA device, each of them makes the host wait for it,
some 30 times in a step of stage 1. A plan on the host costs no wait, and its copy from pinned
memory runs beside the step before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from hpgr_plugin.components.mim import MaskedItemModel, MaskedItemOutput, MaskPlan
from hpgr_plugin.data import Batch, SequenceBatch
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker, RequestPlan

_Value = TypeVar("_Value")


class PlannedSequences(NamedTuple):
    """User sequences and their plan.

    Attributes:
        sequences: of B users.
        plan: of the same sequences.
    """

    sequences: SequenceBatch
    plan: MaskPlan

    def to(self, device: torch.device) -> PlannedSequences:
        """Both on the device."""
        return Packed(self, pinned=False).to(device) if device.type != "cpu" else self

    def output_of(self, model: nn.Module) -> MaskedItemOutput:
        """What a masked item model makes of them."""
        batch = self.sequences
        output: MaskedItemOutput = model(
            batch.items, batch.offsets, batch.timestamps, actions=batch.actions, plan=self.plan
        )
        return output


class SequencePlanner(NamedTuple):
    """Plans batches on the host for a model on a device."""

    model: MaskedItemModel
    device: torch.device

    def plan(
        self, batch: SequenceBatch, generator: torch.Generator
    ) -> PlannedSequences | Packed[PlannedSequences]:
        """The batch with its plan, in pinned memory where the device is CUDA.

        Args:
            batch: on the host.
            generator: draws what `MaskedItemModel.forward` draws.
        """
        plan = self.model.plan(
            batch.items,
            batch.offsets,
            batch.timestamps,
            generator=generator,
            device_type=self.device.type,
        )
        planned = PlannedSequences(batch, plan)
        return Packed(planned, pinned=True) if self.device.type == "cuda" else planned


class PlannedRequests(NamedTuple):
    """Requests of stage 2 and their plan.

    Attributes:
        batch: the requests.
        plan: of the same requests.
    """

    batch: Batch
    plan: RequestPlan

    def to(self, device: torch.device) -> PlannedRequests:
        """Both on the device."""
        return Packed(self, pinned=False).to(device) if device.type != "cpu" else self

    def logits_of(self, model: nn.Module) -> Tensor:
        """What a ranker makes of them, for every task: `[1 + tasks, C]`."""
        logits: Tensor = model(self.batch, every_task=True, plan=self.plan)
        return logits


class RequestPlanner(NamedTuple):
    """Plans requests on the host for a ranker on a device."""

    model: HSTURanker
    device: torch.device

    def plan(self, batch: Batch) -> PlannedRequests | Packed[PlannedRequests]:
        """The batch, on the host, with its plan, in pinned memory where the device is CUDA."""
        plan = self.model.plan_requests(batch, device_type=self.device.type)
        planned = PlannedRequests(batch, plan)
        return Packed(planned, pinned=True) if self.device.type == "cuda" else planned


@dataclass(frozen=True)
class _Slot:
    """Which piece of a packed buffer a tensor is."""

    dtype: torch.dtype
    number: int
    shape: torch.Size


class Packed(Generic[_Value]):
    """Tensors in nested tuples, dicts and batches, side by side: moved by one copy for each dtype.

    Args:
        value: holds the tensors, on the host; anything else in it stays as it is.
        pinned: in pinned memory, from which a copy to a CUDA device is not waited for.
    """

    def __init__(self, value: _Value, *, pinned: bool) -> None:
        tensors: dict[torch.dtype, list[Tensor]] = {}

        def take(tensor: Tensor) -> _Slot:
            same = tensors.setdefault(tensor.dtype, [])
            same.append(tensor)
            return _Slot(tensor.dtype, len(same) - 1, tensor.shape)

        self._value = _with_leaves(value, Tensor, take)
        # Every second piece is a gap: each tensor begins at a multiple of 64 bytes, so that kernels
        # are not compiled again for another alignment.
        self._sizes = {
            dtype: [size for x in same for size in (x.numel(), -x.nbytes % 64 // x.itemsize)]
            for dtype, same in tensors.items()
        }
        self._buffers = {}
        for dtype, same in tensors.items():
            buffer = torch.empty(sum(self._sizes[dtype]), dtype=dtype, pin_memory=pinned)
            for piece, tensor in zip(self._pieces(buffer), same, strict=True):
                piece.copy_(tensor.flatten())
            self._buffers[dtype] = buffer

    def to(self, device: torch.device) -> _Value:
        """The value with its tensors on the device."""
        pieces = {
            dtype: self._pieces(buffer.to(device, non_blocking=True))
            for dtype, buffer in self._buffers.items()
        }
        value: _Value = _with_leaves(
            self._value, _Slot, lambda slot: pieces[slot.dtype][slot.number].view(slot.shape)
        )
        return value

    def _pieces(self, buffer: Tensor) -> tuple[Tensor, ...]:
        return buffer.split(self._sizes[buffer.dtype])[::2]


def _with_leaves(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """The nested value with everything of this kind changed, and the rest as it is."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {name: _with_leaves(part, kind, change) for name, part in value.items()}
    if isinstance(value, Batch | SequenceBatch):
        return type(value)(**_with_leaves(vars(value), kind, change))
    if not isinstance(value, tuple):
        return value
    parts = [_with_leaves(part, kind, change) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
