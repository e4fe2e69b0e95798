"""Attention of candidates over a kept history, which they see whole or by a plan."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hpgr_plugin.ops.hstu_attention.buckets import time_buckets
from hpgr_plugin.ops.slot_attention import Settings, SlotBias, Slots, slot_attention
from hpgr_plugin.serving.bias import LayerBias
from hpgr_plugin.serving.cached_encoder import few
from hpgr_plugin.serving.chunks import rows_at_once
from hpgr_plugin.serving.history_cache import ReadyHistory

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class KeptAttention:
    """The attention of all layers; nothing here waits for the device.

    Args:
        num_heads: of the attention.
        settings: of the attention.
        bias: of the layers, or None.
    """

    def __init__(self, num_heads: int, settings: Settings, bias: LayerBias | None) -> None:
        self.num_heads = num_heads
        self.settings = settings
        self.bias = bias

    def parts(
        self, history: ReadyHistory, kept: Slots | None, time: Tensor, count: int
    ) -> list[tuple[slice, Attend]]:
        """The attention of `count` candidates, some at a time.

        Args:
            history: that they read.
            kept: what each of them reads of it; None: all.
            time: int64 `[]`, when they are shown.
            count: of the candidates.

        Returns:
            Rows of candidates, and depth, queries, keys and values `[c, D]` -> `[c, D]` of them.
        """
        places = bias = None
        if self.bias is not None:
            own, times = history.marks
            places = time_buckets(time - times, self.bias.num_times) + own
            if not by_kernel(kept):
                bias = self.bias.at(places)
        width = self.chunk_width(history, kept)
        step = rows_at_once("candidates", width, history.layers.device)
        if step >= count:
            return [(slice(0, count), self._attention(history, kept, places, bias))]
        parts = []
        for begin in range(0, count, step):
            rows = slice(begin, min(begin + step, count))
            chosen = None if kept is None else kept.take(rows)
            parts.append((rows, self._attention(history, chosen, places, bias)))
        return parts

    def chunk_width(self, history: ReadyHistory, kept: Slots | None) -> int:
        """Numbers of a layer's largest result per candidate."""
        if kept is None or not few(kept):
            return history.num_tokens * self.num_heads
        slots = kept.index.shape[1] + len(kept.near)
        # A GPU may gather their rows.
        size = history.layers.shape[-1] if kept.index.is_cuda else 1
        return slots * self.num_heads * size

    def _attention(
        self,
        history: ReadyHistory,
        kept: Slots | None,
        places: Tensor | None,
        bias: Tensor | None,
    ) -> Attend:
        """The attention of some candidates in every layer.

        Args:
            history: that they read.
            kept: what they read of it; None: all.
            places: `[N]` in the bias table, or None.
            bias: `[layers, N]`, or None; not read by the kernel.
        """
        if kept is None or not few(kept):
            weights = None if kept is None else kept.dense()
            return functools.partial(self._dense, history, bias, weights)
        if by_kernel(kept):
            return self._with_kernel(history, kept, places)
        return self._with_products(history, kept, bias)

    def _with_kernel(self, history: ReadyHistory, kept: Slots, places: Tensor | None) -> Attend:
        """Slots by `slot_attention`."""
        biases: list[SlotBias | None] = [None] * len(history.keys)
        if places is not None and self.bias is not None:
            near, slots = places[kept.near].unsqueeze(0), places[kept.index]
            biases = [SlotBias(table, self.bias.own, near, slots) for table in self.bias.tables]

        def attend(depth: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows = history.keys[depth], history.values[depth]
            return slot_attention((q, k, v), rows, kept, biases[depth], self.settings)

        return attend

    def _with_products(self, history: ReadyHistory, kept: Slots, bias: Tensor | None) -> Attend:
        """What all read by products with these rows; the slots by sparse products."""
        of_near = None if bias is None else bias.index_select(1, kept.near)
        near_keys, near_values = history.near_rows
        add_slots = self._sparse(history, kept, bias) if kept.index.numel() else None

        def attend(depth: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            queries = self._split(q).transpose(0, 1).contiguous()
            own = self._own(depth, queries.transpose(0, 1), self._split(k), self._split(v))
            if add_slots is not None:
                own += add_slots(depth, queries).transpose(0, 1)
            rows = near_keys[depth], near_values[depth]
            of_layer = None if of_near is None else of_near[depth]
            return self._among(queries, *rows, of_layer, None, own)

        return attend

    def _sparse(
        self, history: ReadyHistory, kept: Slots, bias: Tensor | None
    ) -> Callable[[int, Tensor], Tensor]:
        """Depth and queries `[H, c, d]` -> the sum over each candidate's slots, not divided by n.

        One matrix of scores is used for all layers.
        """
        scores, bag = kept.pattern, kept.index_of_heads
        values = scores.values().view(self.num_heads, *kept.index.shape)
        of_slots = None
        if bias is not None:
            of_slots = bias.index_select(1, kept.index.flatten()).unflatten(1, kept.index.shape)
        pre = self.settings.mask_position == "pre"

        def attend(depth: int, q: Tensor) -> Tensor:
            if of_slots is not None:
                values.copy_(of_slots[depth])
            torch.sparse.sampled_addmm(
                scores,
                q.flatten(0, 1),
                history.keys[depth].flatten(0, 1).t(),
                beta=0.0 if of_slots is None else 1.0,
                alpha=self.settings.alpha,
                out=scores,
            )
            if pre:
                values.mul_(kept.weights)
            F.silu(values, inplace=True)
            if not pre:
                values.mul_(kept.weights)
            sums = F.embedding_bag(
                bag,
                history.values[depth].flatten(0, 1),
                mode="sum",
                per_sample_weights=values.view(bag.shape),
            )
            return sums.view_as(q)

        return attend

    def _dense(
        self,
        history: ReadyHistory,
        bias: Tensor | None,
        weights: Tensor | None,
        depth: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> Tensor:
        """All of a history; weights `[c, N]` or None."""
        q, k, v = self._split(q), self._split(k), self._split(v)
        of_layer = None if bias is None else bias[depth]
        own = self._own(depth, q, k, v)
        return self._among(
            q.transpose(0, 1), history.keys[depth], history.values[depth], of_layer, weights, own
        )

    def _among(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor | None,
        weights: Tensor | None,
        own: Tensor,
    ) -> Tensor:
        """What is read of rows that all candidates share, added to `own`, and divided by n.

        Args:
            q: `[H, c, d]`.
            keys, values: `[H, N, d]`.
            bias: `[N]` or None.
            weights: `[c, N]` or None.
            own: `[c, H, d]`; it is changed.

        Returns:
            `[c, D]`.
        """
        alpha, share = self.settings.alpha, 1.0 / self.settings.norm_length
        if bias is None:
            scores = torch.bmm(q * alpha, keys.transpose(1, 2))
        else:
            scores = torch.baddbmm(bias, q, keys.transpose(1, 2), alpha=alpha)
        if weights is not None and self.settings.mask_position == "pre":
            scores *= weights
        F.silu(scores, inplace=True)
        if weights is not None and self.settings.mask_position == "post":
            scores *= weights
        own.transpose(0, 1).baddbmm_(scores, values, beta=share, alpha=share)
        return own.flatten(1)

    def _own(self, depth: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What each candidate takes from itself, `[c, H, d]` as all three, not divided by n."""
        scores = (q * k).sum(2, keepdim=True)
        if self.bias is None:
            scores *= self.settings.alpha
        else:
            scores = torch.add(self.bias.itself[depth], scores, alpha=self.settings.alpha)
        return F.silu(scores, inplace=True) * v

    def _split(self, x: Tensor) -> Tensor:
        """`[c, D]` to `[c, H, d]`."""
        return x.unflatten(1, (self.num_heads, -1))


def by_kernel(kept: Slots | None) -> bool:
    """Whether `slot_attention` is taken, which gathers what each candidate reads."""
    return kept is not None and kept.index.is_cuda and few(kept)
