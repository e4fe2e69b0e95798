"""Requests whose history is kept: only the candidates go through the model, all layers at once.

`CachedEncoder` takes the place of a model's encoder, and the model still looks up, numbers and
plans the history of every request. Where a history is kept and the candidates share their time,
nothing of that is read: they see the whole history, and what depends on it was made before.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpgr_plugin.components.attention_hooks import HookInputs, StochasticLength
from hpgr_plugin.components.positions import TimeAwarePositionalEncoder
from hpgr_plugin.hosts.embedded.model.encoder import SequenceEncoder
from hpgr_plugin.hosts.embedded.model.positions import LearnedPositionalEncoder
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker
from hpgr_plugin.hosts.embedded.model.tokens import Domain
from hpgr_plugin.ops.hstu_attention import MaskPosition
from hpgr_plugin.ops.preference_plan.plan import PlanSettings
from hpgr_plugin.ops.slot_attention import Settings, Slots
from hpgr_plugin.serving.anchors import ScoredHistory, spare_for
from hpgr_plugin.serving.bias import LayerBias, bias_places
from hpgr_plugin.serving.cached_encoder import cached_rows, near_rows
from hpgr_plugin.serving.history_cache import HistoryState, ReadyHistory, ReadyPlan
from hpgr_plugin.serving.kept_attention import Attend, KeptAttention
from hpgr_plugin.serving.kept_rows import (
    ServedPreferences,
    keeps_all,
    recent_items,
    window_of,
    window_slots,
)
from hpgr_plugin.serving.requests import EncodedCandidates

_Part = tuple[slice, Attend]  # rows of the candidates of all requests, and their attention


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
        settings = Settings(encoder.alpha, encoder.norm_length, position)
        self.attention = KeptAttention(self.num_heads, settings, bias)

    @property
    def plan_settings(self) -> PlanSettings:
        """Of the hook; only where there is one."""
        assert self.hook is not None
        return self.hook.settings

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
        layers = torch.stack([torch.stack(state.keys), torch.stack(state.values)])
        marks = state.marks[:, :2].T.clone(memory_format=torch.contiguous_format)
        if self.bias is not None:
            own, times = marks
            distance = state.num_items + 1 - own
            marks[0] = bias_places(distance, torch.zeros_like(times), self.bias.sizes)
        plan = None if self.hook is None else self._ready_plan(state.history[0], state.num_items)
        ready = ReadyHistory(layers, marks, plan)
        return replace(state, keys=ready.keys, values=ready.values, ready=ready)

    def _ready_plan(self, items: np.ndarray, length: int) -> ReadyPlan | None:
        """Of these items `[n]`; None where all of them are kept with weight 1."""
        settings, scored, window = self.plan_settings, None, None
        if keeps_all(settings, length):
            return None
        recent = recent_items(settings, length)
        near = near_rows(recent, self.context, self.device)
        if settings.top_k:
            ids = torch.from_numpy(items.copy()).to(self.device)
            rows = self.scored(self.model.embed_items(ids), ids)
            scored = ScoredHistory.of(rows, ids, spare_for(items, self.device))
            window = window_of(settings, length, scored.rows)
        return ReadyPlan(scored, window, near, near.new_full((), recent.start - 1))

    def scored(self, rows: Tensor, ids: Tensor) -> Tensor:
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
        items, visible, times = self._moved(requests, states)
        rows = self.model.embed_items(items)
        parts, start = [], 0
        for request, state, time in zip(requests, states, times, strict=True):
            own = slice(start, start + request.candidates.shape[1])
            assert state.ready is not None
            parts += self._parts(state.ready, rows, items, own, time, exact=True)[0]
            start = own.stop
        return self._scores(items, visible, rows, parts)

    @torch.no_grad()
    def logits_and_ties(
        self, items: Tensor, visible: Tensor, time: Tensor, history: ReadyHistory
    ) -> tuple[Tensor, Tensor | None]:
        """Those of one request, without a wait for the device.

        Args:
            items: int64 `[C]`.
            visible: int64 `[1]`, items of the history.
            time: int64 `[]`, when the candidates are shown.
            history: of the request.

        Returns:
            Logits `[1 + tasks, C]`; and bool `[C]`, candidates of which another anchor may be the
            right one because it is as good: `logits` has them right. None: of no candidate.
        """
        rows = self.model.embed_items(items)
        every = slice(0, len(items))
        parts, tied = self._parts(history, rows, items, every, time, exact=False)
        return self._scores(items, visible, rows, parts), tied

    def _moved(
        self, requests: Sequence[EncodedCandidates], states: Sequence[HistoryState]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Items and visible history items `[C]`, and the time of each request, in one copy."""
        counts = [request.candidates.shape[1] for request in requests]
        visible = np.repeat([state.num_items for state in states], counts)
        candidates = [request.candidates[0] for request in requests]
        times = [request.candidates[1, :1] for request in requests]
        packed = self.moved(np.concatenate([*candidates, visible, *times]))
        items, seen, shown = packed.split([len(visible), len(visible), len(requests)])
        return items, seen, shown

    def moved(self, numbers: np.ndarray) -> Tensor:
        """On the device; a GPU is not waited for."""
        moved = torch.from_numpy(numbers)
        if self.device.type == "cuda":
            moved = moved.pin_memory().to(self.device, non_blocking=True)
        return moved

    def _parts(
        self,
        history: ReadyHistory,
        rows: Tensor,
        items: Tensor,
        own: slice,
        time: Tensor,
        *,
        exact: bool,
    ) -> tuple[list[_Part], Tensor | None]:
        """The attention of one request's candidates, some at a time, and see `_slots`."""
        kept, tied = self._slots(history, rows[own], items[own], exact=exact)
        count = own.stop - own.start
        parts = [
            (slice(own.start + some.start, own.start + some.stop), attend)
            for some, attend in self.attention.parts(history, kept, time, count)
        ]
        return parts, tied

    def _slots(
        self, history: ReadyHistory, rows: Tensor, items: Tensor, *, exact: bool
    ) -> tuple[Slots | None, Tensor | None]:
        """What candidates keep of their history, and the ties of `ScoredHistory.anchors`.

        Args:
            history: of one request.
            rows: raw embeddings `[c, D]` of its candidates.
            items: int64 `[c]`.
            exact: whether to wait for the device and resolve ties, of which then none are left.
        """
        plan = history.plan
        if plan is None:
            return None, None
        if plan.scored is None or plan.window is None:
            places = plan.near.new_zeros(len(items), 0)
            return self._slots_of(plan, history, places, rows.new_zeros(places.shape)), None
        chosen = self.scored(rows, items)
        anchors, tied = plan.scored.anchors(chosen, None, self.plan_settings.top_k)
        if exact:
            anchors = plan.scored.exact(chosen, None, anchors, tied)
        slots = window_slots(anchors, plan.end, plan.window)
        return self._slots_of(plan, history, *slots), None if exact else tied

    def _slots_of(
        self, plan: ReadyPlan, history: ReadyHistory, places: Tensor, weights: Tensor
    ) -> Slots:
        """Of places in the history, behind the context tokens."""
        places = places + self.context if self.context else places
        return Slots(plan.near, places, weights, history.num_tokens, self.num_heads)

    def _scores(
        self, items: Tensor, visible: Tensor, rows: Tensor, parts: Sequence[_Part]
    ) -> Tensor:
        """Logits of all tasks `[1 + tasks, C]`.

        Args:
            items: int64 `[C]`.
            visible: int64 `[C]` or `[1]`, how many items of its history each sees.
            rows: raw embeddings `[C, D]`.
            parts: of the attention.
        """
        model = self.model
        tokens, positions = rows, model.positional_encoder
        if isinstance(positions, LearnedPositionalEncoder):
            tokens = tokens + positions.table.weight[0]
        elif positions is not None and positions.form == "absolute":
            tokens = tokens + positions.table(visible)
        gated = model.rare_items is not None and model.rare_items.replaces_features
        if model.item_features is not None and not gated:
            tokens = tokens + model.item_features(items)
        encoded = self._encode(tokens * model.input_scale, parts)
        logits: Tensor = model.head(encoded).squeeze(1)
        if model.item_bias is not None:
            logits = logits + model.item_bias(items).squeeze(1)
        if not model.task_names:
            return logits.unsqueeze(0)
        return torch.stack([logits, *model.task_heads.logits(encoded, items)])

    def _encode(self, x: Tensor, parts: Sequence[_Part]) -> Tensor:
        """Candidates `[C, D]` through all layers."""
        domains = torch.full((len(x),), int(Domain.CANDIDATE), device=x.device)

        def attend(depth: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if len(parts) == 1:
                return parts[0][1](depth, q, k, v)
            return torch.cat([of(depth, q[rows], k[rows], v[rows]) for rows, of in parts])

        depths = itertools.count()
        spec = cached_rows(domains, lambda q, k, v: attend(next(depths), q, k, v))
        for layer in self.encoder.layers:
            x = layer(x, domains=domains, spec=spec, bias=None)
        return x
