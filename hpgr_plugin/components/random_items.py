"""The `attention_hook` slot: random items, what a choice of items is compared with."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hpgr_plugin.components.attention_hooks import AttentionHook, HookInputs
from hpgr_plugin.components.checks import check_at_least, check_choice
from hpgr_plugin.components.positions import count_earlier
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.ops.jagged import complete_cumsum, ranges, segment_ids
from hpgr_plugin.ops.preference_plan import PreferencePlan

# Odd, with bits everywhere: multiplied by them, and shifted, ids lose their order.
_FACTORS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_BITS = 31


class RandomItems(AttentionHook):
    """A candidate attends to `keep` of its visible items, drawn without replacement.

    A draw is a hash of candidate, item, place and seed: it repeats, in evaluation too, and does not
    depend on what else is in the batch.

    Args:
        keep: items of a candidate; all, where it sees fewer.
        layout: "per_candidate" or "shared_history", see `AttentionHook`.
        seed: of the draws.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        *,
        keep: int,
        layout: Literal["per_candidate", "shared_history"] = "per_candidate",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_at_least(1, keep=keep)
        check_at_least(0, seed=seed)
        check_choice(("per_candidate", "shared_history"), layout=layout)
        self.keep = keep
        self.layout = layout
        self.seed = seed

    @torch.no_grad()
    def plan(self, inputs: HookInputs) -> PreferencePlan:
        """One row per candidate, with weights 1.

        Raises:
            HpgrError: the host does not say which items they are.
        """
        if inputs.history_ids is None or inputs.candidate_ids is None:
            raise HpgrError("hpgr.RandomItems needs history_ids and candidate_ids, got None")
        users = segment_ids(inputs.candidate_offsets, len(inputs.candidate_ids))
        starts = inputs.history_offsets[:-1].long()[users]
        visible = self._visible(inputs, users)
        index = ranges(starts, visible)
        offsets = complete_cumsum(visible)
        row = segment_ids(offsets, index.numel())
        drawn = self._draw(
            inputs.candidate_ids[row], inputs.history_ids[index], index - starts[row]
        )
        order = (row << _BITS | drawn).argsort(stable=True)
        rank = torch.arange(len(order), device=order.device) - offsets[row]
        kept = torch.empty_like(rank, dtype=torch.bool).index_copy(0, order, rank < self.keep)
        dtype = torch.promote_types(inputs.history_embeddings.dtype, torch.float32)
        index = index[kept]
        weights = index.new_ones(len(index), dtype=dtype)
        return PreferencePlan(index, weights, complete_cumsum(visible.clamp(max=self.keep)))

    def _visible(self, inputs: HookInputs, users: Tensor) -> Tensor:
        """How many history items each candidate sees, int64 `[C]`; they are the first ones."""
        if inputs.history_timestamps is None or inputs.candidate_timestamps is None:
            return inputs.history_offsets.long().diff()[users]
        return count_earlier(
            inputs.history_timestamps,
            inputs.history_offsets,
            inputs.candidate_timestamps,
            inputs.candidate_offsets,
        )

    def _draw(self, candidates: Tensor, items: Tensor, places: Tensor) -> Tensor:
        """A number below `2 ** _BITS` for each pair, int64."""
        drawn = torch.full_like(candidates, self.seed + 1)
        for values, factor in zip((candidates, items, places), _FACTORS, strict=True):
            drawn = (drawn ^ (values + 1)) * factor
            drawn = drawn ^ (drawn >> 29 & (1 << 35) - 1)
        return drawn & (1 << _BITS) - 1
