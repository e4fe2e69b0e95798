"""Batches with their plans: made on the host, ahead of the step, and moved at once.

What is masked, the sessions and the padding of the attention have sizes that depend on the data,
and so has what is checked of a batch. On a CUDA device, each of them makes the host wait for it,
some 30 times in a step of stage 1. A plan on the host costs no wait, and its copy from pinned
memory runs beside the step before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hpgr_plugin.components.mim import MaskedItemModel, MaskedItemOutput, MaskPlan
from hpgr_plugin.data import Batch, SequenceBatch
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker, RequestPlan


class PlannedSequences(NamedTuple):
    """User sequences and their plan.

    Attributes:
        sequences: of B users.
        plan: of the same sequences.
    """

    sequences: SequenceBatch
    plan: MaskPlan

    def to(self, device: torch.device) -> PlannedSequences:
        """Both on the device; the copy from pinned memory is not waited for."""
        return PlannedSequences(
            self.sequences.to(device, non_blocking=True), _moved(self.plan, device)
        )

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

    def plan(self, batch: SequenceBatch, generator: torch.Generator) -> PlannedSequences:
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
        if self.device.type != "cuda":
            return PlannedSequences(batch, plan)
        return PlannedSequences(batch.pin_memory(), _moved(plan, None))


class PlannedRequests(NamedTuple):
    """Requests of stage 2 and their plan.

    Attributes:
        batch: the requests.
        plan: of the same requests.
    """

    batch: Batch
    plan: RequestPlan

    def to(self, device: torch.device) -> PlannedRequests:
        """Both on the device; the copy from pinned memory is not waited for."""
        return PlannedRequests(self.batch.to(device, non_blocking=True), _moved(self.plan, device))

    def logits_of(self, model: nn.Module) -> Tensor:
        """What a ranker makes of them, for every task: `[1 + tasks, C]`."""
        logits: Tensor = model(self.batch, every_task=True, plan=self.plan)
        return logits


class RequestPlanner(NamedTuple):
    """Plans requests on the host for a ranker on a device."""

    model: HSTURanker
    device: torch.device

    def plan(self, batch: Batch) -> PlannedRequests:
        """The batch, on the host, with its plan, in pinned memory where the device is CUDA."""
        plan = self.model.plan_requests(batch, device_type=self.device.type)
        if self.device.type != "cuda":
            return PlannedRequests(batch, plan)
        return PlannedRequests(batch.pin_memory(), _moved(plan, None))


def _moved(value: Any, device: torch.device | None) -> Any:
    """Tensors in nested tuples on a device, or in pinned memory for None; the rest as it is."""
    if isinstance(value, Tensor):
        return value.pin_memory() if device is None else value.to(device, non_blocking=True)
    if not isinstance(value, tuple):
        return value
    parts = [_moved(part, device) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
