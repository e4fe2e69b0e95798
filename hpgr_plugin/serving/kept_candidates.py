"""Requests whose history is kept: only the candidates go through the model, all layers at once.

`CachedEncoder` takes the place of a model's encoder, and the model still looks up, numbers and
plans the history of every request. Where a history is kept and the candidates share their time,
nothing of that is read: they see the whole history, and what depends on it was made before.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hpgr_plugin.components.attention_hooks import HookInputs, StochasticLength
from hpgr_plugin.components.positions import TimeAwarePositionalEncoder
from hpgr_plugin.hosts.embedded.model.encoder import SequenceEncoder
from hpgr_plugin.hosts.embedded.model.positions import LearnedPositionalEncoder
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker
from hpgr_plugin.hosts.embedded.model.tokens import Domain
from hpgr_plugin.ops.hstu_attention import MaskPosition
from hpgr_plugin.ops.hstu_attention.buckets import time_buckets
from hpgr_plugin.ops.slot_attention import Settings, SlotBias, Slots, slot_attention
from hpgr_plugin.serving.bias import LayerBias, bias_places
from hpgr_plugin.serving.cached_encoder import cached_rows, few, near_rows, slots_of
from hpgr_plugin.serving.history_cache import HistoryState, ReadyHistory
from hpgr_plugin.serving.kept_rows import ScoredHistory, ServedPreferences
from hpgr_plugin.serving.requests import EncodedCandidates

# Scores at once: on a CPU what its cache holds, on a GPU what its memory does.
_CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**27}

_Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class _Part:
    """Some candidates of one request.

    Attributes:
        rows: of the candidates of all requests.
        attend: depth, queries, keys and values `[c, D]` -> `[c, D]`.
    """

    rows: slice
    attend: _Attend


class KeptCandidates:
    """Logits of candidates, each request at one time, over kept histories.

    Args:
        model: in evaluation mode; one that `serves`.
        encoder: of the trained model; its layers take `CachedRows`.
        bias: of its layers.
    """

    def __init__(self, model: HSTURanker, encoder: SequenceEncoder, bias: LayerBias | None) -> None:
        self.model = model
        self.encoder = encoder
        self.bias = bias
        first: Any = encoder.layers[0]
        self.num_heads: int = first.num_heads
        self.device = model.item_table.weight.device
        hook = model.attention_hook
        self.hook = hook.hook if isinstance(hook, ServedPreferences) else None
        self.context = 0 if model.user_features is None else model.user_features.tokens_per_user
        position: MaskPosition = "post" if self.hook is None else self.hook.mask_position
        self.settings = Settings(encoder.alpha, encoder.norm_length, position)

    @staticmethod
    def serves(model: HSTURanker) -> bool:
        """Whether candidates of this model read nothing of a history but its keys and values."""
        hook, positions = model.attention_hook, model.positional_encoder
        known = (TimeAwarePositionalEncoder, LearnedPositionalEncoder)
        return (
            type(model).forward is HSTURanker.forward
            and not model.training
            and not len(model.token_features)
            and not model.reads_statistics
            and (model.sem is None or not model.sem.session_tokens)
            and type(positions) in known
            and (hook is None or isinstance(hook, ServedPreferences | StochasticLength))
        )

    # -- the history --------------------------------------------------------------------------

    @torch.no_grad()
    def ready(self, state: HistoryState) -> HistoryState:
        """A kept history, which knows its events, with what further requests of it need."""
        assert state.history is not None
        scored, near = None, torch.zeros(0, dtype=torch.int64, device=self.device)
        if self.hook is not None:
            ids = torch.from_numpy(state.history[0].copy()).to(self.device)
            scored = ScoredHistory.of(self._scored(self.model.embed_items(ids), ids), ids)
            recent = scored.recent(self.hook.settings)
            near = near_rows(recent, self.context, self.device)
        keys, values = (
            tuple(x.index_select(1, near) for x in of_layers)
            for of_layers in (state.keys, state.values)
        )
        positions, times = state.marks[:, :2].T.contiguous().cpu()
        if self.bias is not None:
            own = state.num_items + 1
            positions = bias_places(own - positions, torch.zeros_like(times), self.bias.sizes)
        return replace(state, ready=ReadyHistory(positions, times, scored, near, keys, values))

    def _scored(self, rows: Tensor, ids: Tensor) -> Tensor:
        """The embeddings `[L, D]` that choose anchors, of items with these raw ones."""
        assert self.hook is not None
        if self.hook.table == "live" and self.hook.score == "dot":
            return rows
        none = ids[:0]
        inputs = HookInputs(rows[:0], rows, none, none, history_ids=none, candidate_ids=ids)
        return self.hook.scored(inputs).candidate_embeddings

    # -- the candidates -----------------------------------------------------------------------

    @torch.no_grad()
    def logits(
        self, requests: Sequence[EncodedCandidates], states: Sequence[HistoryState]
    ) -> Tensor:
        """Of all tasks, `[1 + tasks, C]`, the main one first; one ready state each."""
        model = self.model
        items, visible, places = self._moved(requests, states)
        rows = model.embed_items(items)
        tokens, positions = rows, model.positional_encoder
        if isinstance(positions, LearnedPositionalEncoder):
            tokens = tokens + positions.table.weight[0]
        elif positions is not None and positions.form == "absolute":
            tokens = tokens + positions.table(visible)
        gated = model.rare_items is not None and model.rare_items.replaces_features
        if model.item_features is not None and not gated:
            tokens = tokens + model.item_features(items)
        encoded = self._encode(
            tokens * model.input_scale, list(self._parts(requests, states, rows, items, places))
        )
        logits: Tensor = model.head(encoded).squeeze(1)
        if model.item_bias is not None:
            logits = logits + model.item_bias(items).squeeze(1)
        if not model.task_names:
            return logits.unsqueeze(0)
        return torch.stack([logits, *model.task_heads.logits(encoded, items)])

    def _moved(
        self, requests: Sequence[EncodedCandidates], states: Sequence[HistoryState]
    ) -> tuple[Tensor, Tensor, Sequence[Tensor | None]]:
        """Items and visible history items `[C]`, and the bias' places `[N]` of each request.

        One copy moves all of them.
        """
        candidates = [request.candidates[0] for request in requests]
        visible = [
            np.full(one.candidates.shape[1], state.num_items, np.int64)
            for one, state in zip(requests, states, strict=True)
        ]
        pieces = [torch.from_numpy(np.concatenate([*candidates, *visible]))]
        if self.bias is not None:
            size = self.bias.num_times
            pieces += [_places(*pair, size) for pair in zip(requests, states, strict=True)]
        sizes = [len(piece) for piece in pieces[1:]]
        packed = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if self.device.type == "cuda":
            packed = packed.pin_memory().to(self.device, non_blocking=True)
        count = len(pieces[0]) // 2
        items, seen, *places = packed.split([count, count, *sizes])
        return items, seen, places or [None] * len(requests)

    def _encode(self, x: Tensor, parts: Sequence[_Part]) -> Tensor:
        """Candidates `[C, D]` through all layers."""
        domains = torch.full((len(x),), int(Domain.CANDIDATE), device=x.device)

        def attend(depth: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if len(parts) == 1:
                return parts[0].attend(depth, q, k, v)
            return torch.cat(
                [part.attend(depth, q[part.rows], k[part.rows], v[part.rows]) for part in parts]
            )

        depths = itertools.count()
        spec = cached_rows(domains, lambda q, k, v: attend(next(depths), q, k, v))
        for layer in self.encoder.layers:
            x = layer(x, domains=domains, spec=spec, bias=None)
        return x

    def _parts(
        self,
        requests: Sequence[EncodedCandidates],
        states: Sequence[HistoryState],
        rows: Tensor,
        items: Tensor,
        places: Sequence[Tensor | None],
    ) -> Iterator[_Part]:
        """The candidates request by request, some at a time; rows are their raw embeddings."""
        start = 0
        for request, state, where in zip(requests, states, places, strict=True):
            end = start + request.candidates.shape[1]
            own = slice(start, end)
            kept = None if self.hook is None else self._slots(state, rows[own], items[own])
            width = len(state.tokens) * self.num_heads
            if kept is not None and few(kept):  # a GPU may gather their rows
                slots = kept.index.shape[1] + len(kept.near)
                width = slots * (rows.shape[1] if rows.is_cuda else self.num_heads)
            bias = None
            if self.bias is not None and where is not None and not _by_kernel(kept):
                bias = self.bias.at(where)
            step = max(1, _CHUNK_ELEMENTS[rows.device.type] // max(1, width))
            for begin in range(start, end, step):
                stop = min(begin + step, end)
                chosen = kept
                if kept is not None and step < end - start:
                    chosen = kept.take(slice(begin - start, stop - start))
                yield _Part(slice(begin, stop), self._attention(state, chosen, where, bias))
            start = end

    def _slots(self, state: HistoryState, rows: Tensor, items: Tensor) -> Slots:
        """What each candidate keeps of its history."""
        assert self.hook is not None
        assert state.ready is not None
        assert state.ready.scored is not None
        plan = state.ready.scored.plan(self._scored(rows, items), self.hook.settings)
        return slots_of(
            plan, self.context, len(state.tokens), self.num_heads, near=state.ready.near
        )

    # -- attention ----------------------------------------------------------------------------

    def _attention(
        self, state: HistoryState, kept: Slots | None, places: Tensor | None, bias: Tensor | None
    ) -> _Attend:
        """The attention of some candidates in every layer.

        Args:
            state: ready.
            kept: what they read of it; None: all.
            places: `[N]` in the bias table, or None.
            bias: `[layers, N]`, or None; not read by the kernel.
        """
        if kept is None or not few(kept):
            weights = None if kept is None else kept.dense()
            return functools.partial(self._dense, state.keys, state.values, bias, weights)
        if _by_kernel(kept):
            return self._with_kernel(state, kept, places)
        return self._with_products(state, kept, bias)

    def _with_kernel(self, state: HistoryState, kept: Slots, places: Tensor | None) -> _Attend:
        """Slots by `slot_attention`."""
        biases: list[SlotBias | None] = [None] * len(state.keys)
        if places is not None and self.bias is not None:
            near, slots = places[kept.near].unsqueeze(0), places[kept.index]
            biases = [SlotBias(table, self.bias.own, near, slots) for table in self.bias.tables]

        def attend(depth: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows = state.keys[depth], state.values[depth]
            return slot_attention((q, k, v), rows, kept, biases[depth], self.settings)

        return attend

    def _with_products(self, state: HistoryState, kept: Slots, bias: Tensor | None) -> _Attend:
        """What all read by products with these rows; the slots by sparse products."""
        assert state.ready is not None
        ready = state.ready
        of_near = None if bias is None else bias.index_select(1, kept.near)
        add_slots = self._sparse(state, kept, bias) if kept.index.numel() else None

        def attend(depth: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            queries = self._split(q).transpose(0, 1).contiguous()
            own = self._own(depth, queries.transpose(0, 1), self._split(k), self._split(v))
            if add_slots is not None:
                own += add_slots(depth, queries).transpose(0, 1)
            rows = ready.near_keys[depth], ready.near_values[depth]
            of_layer = None if of_near is None else of_near[depth]
            return self._among(queries, *rows, of_layer, None, own)

        return attend

    def _sparse(
        self, state: HistoryState, kept: Slots, bias: Tensor | None
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
                state.keys[depth].flatten(0, 1).t(),
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
                state.values[depth].flatten(0, 1),
                mode="sum",
                per_sample_weights=values.view(bag.shape),
            )
            return sums.view_as(q)

        return attend

    def _dense(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
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
        return self._among(q.transpose(0, 1), keys[depth], values[depth], of_layer, weights, own)

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


def _by_kernel(kept: Slots | None) -> bool:
    """Whether `slot_attention` is taken, which gathers what each candidate reads."""
    return kept is not None and kept.index.is_cuda and few(kept)


def _places(request: EncodedCandidates, state: HistoryState, num_times: int) -> Tensor:
    """Places in the bias table of a candidate over all tokens, int64 `[N]` on the host."""
    assert state.ready is not None
    passed = int(request.candidates[1, 0]) - state.ready.times
    return time_buckets(passed, num_times).add_(state.ready.places)
