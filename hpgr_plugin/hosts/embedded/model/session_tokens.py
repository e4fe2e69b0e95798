"""Session tokens in the histories of a batch, and in the plan of an attention hook."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hpgr_plugin.ops.jagged import complete_cumsum, ranges, segment_ids
from hpgr_plugin.ops.preference_plan import PreferencePlan


class MixedHistory(NamedTuple):
    """Where T history items and K session tokens lie when each token goes before its item.

    Attributes:
        offsets: int64 `[B + 1]` of the mixed histories.
        item_rows: int64 `[T]`, the row of every item.
        token_rows: int64 `[K]`, the row of every token.
        token_offsets: int64 `[B + 1]`, whose the tokens are.
        before: int64 `[K]`, the item that each token goes before.
        added: int64 `[A]`, the rows of the tokens that each row of a plan gets; None without plans.
        added_offsets: int64 `[R + 1]`, which of them a row of a plan gets.
    """

    offsets: Tensor
    item_rows: Tensor
    token_rows: Tensor
    token_offsets: Tensor
    before: Tensor
    added: Tensor | None = None
    added_offsets: Tensor | None = None

    @classmethod
    def of(cls, before: Tensor, history_offsets: Tensor, num_items: int) -> MixedHistory:
        """The mixture of K tokens, each before an item `[K]`, with histories `[B + 1]` of T."""
        items = torch.arange(num_items, device=before.device)
        token_offsets = torch.searchsorted(before, history_offsets)
        return cls(
            offsets=history_offsets + token_offsets,
            item_rows=items + torch.searchsorted(before, items, right=True),
            token_rows=before + torch.arange(len(before), device=before.device),
            token_offsets=token_offsets,
            before=before,
        )

    def mix(self, of_items: Tensor, of_tokens: Tensor) -> Tensor:
        """Rows `[T, ...]` of items and `[K, ...]` of tokens in their order, `[T + K, ...]`."""
        rows = torch.cat([self.item_rows, self.token_rows])
        values = torch.cat([of_items, of_tokens.to(of_items.dtype)])
        return torch.empty_like(values).index_copy(0, rows, values)

    def for_plans(self, users: Tensor, first_hidden: Tensor | None) -> MixedHistory:
        """The same with the tokens that `mix_plan` adds.

        Args:
            users: int64 `[R]`, whose the rows of a plan are.
            first_hidden: int64 `[R]`, the first item of the histories that a row must not see:
                tokens before it or before later items are left out. None leaves none out.
        """
        starts, ends = self.token_offsets[users], self.token_offsets[users + 1]
        if first_hidden is not None:
            ends = torch.minimum(ends, torch.searchsorted(self.before, first_hidden))
        counts = (ends - starts).clamp(min=0)
        return self._replace(
            added=self.token_rows[ranges(starts, counts)], added_offsets=complete_cumsum(counts)
        )

    def mix_plan(self, plan: PreferencePlan) -> PreferencePlan:
        """The plan of R rows over the items with the tokens of `for_plans`, with weight 1."""
        added, added_offsets = self.added, self.added_offsets
        assert added is not None
        assert added_offsets is not None
        rows = torch.cat(
            [
                segment_ids(plan.offsets, plan.index.numel()),
                segment_ids(added_offsets, added.numel()),
            ]
        )
        index = torch.cat([self.item_rows[plan.index], added])
        weights = torch.cat([plan.weights, plan.weights.new_ones(added.numel())])
        total = len(self.item_rows) + len(self.token_rows)
        order = (rows * total + index).argsort()
        return PreferencePlan(index[order], weights[order], plan.offsets + added_offsets)
