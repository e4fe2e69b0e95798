"""The encoder at serving time: a history's keys and values once, candidates against kept rows.

History and context tokens never see candidates, so their keys and values depend on nothing else
of the request. Candidates see the history and themselves: a request with C candidates costs
`O(C n)` with a dense history of n items, and `O(C m)` where a plan keeps m of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpgr_plugin.hosts.embedded.model.encoder import SequenceEncoder
from hpgr_plugin.hosts.embedded.model.hstu import SequenceLayer
from hpgr_plugin.hosts.embedded.model.tokens import Marks, TokenSequence
from hpgr_plugin.ops.hstu_attention import AttentionSpec, MaskPosition, PositionTimeBias
from hpgr_plugin.ops.preference_plan import PreferencePlan
from hpgr_plugin.ops.slot_attention import Settings, SlotBias, Slots, slot_attention
from hpgr_plugin.serving.bias import LayerBias, bias_places
from hpgr_plugin.serving.chunks import rows_at_once
from hpgr_plugin.serving.history_cache import HistoryCache, HistoryState
from hpgr_plugin.serving.kept_rows import ServedPlan, UserPlan


@dataclass(frozen=True, eq=False, kw_only=True)
class CachedRows(AttentionSpec):
    """An attention of new rows over kept ones; it takes the place of a layer's attention.

    Attributes:
        attend_rows: new queries, keys and values `[T, D]` of this layer -> `[T, D]`.
    """

    attend_rows: Any


class CachedEncoder(nn.Module):
    """Encodes as the trained encoder does, with the states of a `HistoryCache`.

    Sequences that a plan has shortened (one per candidate) go through the trained encoder: no two
    candidates share keys there.

    Args:
        encoder: of the trained model; its layers are used, and changed to take `CachedRows`.
        cache: of the histories.
    """

    def __init__(self, encoder: SequenceEncoder, cache: HistoryCache) -> None:
        super().__init__()
        self.encoder = encoder
        self.cache = cache
        self._users: Sequence[Hashable] | None = None
        self._versions: Sequence[Hashable] = ()
        self._histories: Sequence[np.ndarray | None] = ()
        first: Any = encoder.layers[0]
        self.num_heads: int = first.num_heads
        self.bias = LayerBias.of(encoder)
        take_cached_rows(encoder)

    def for_users(
        self,
        users: Sequence[Hashable] | None,
        versions: Sequence[Hashable] | None = None,
        histories: Sequence[np.ndarray] | None = None,
    ) -> None:
        """Whose histories the next batch holds.

        Args:
            users: a key per request; None: nothing is kept.
            versions: of all that a request's context and history tokens are made from, one each.
                Where a kept version is the same the tokens are not compared.
            histories: int64 `[3, n]` each, which go into the states.
        """
        self._users = users
        self._histories = [None] * len(users or ()) if histories is None else histories
        self._versions = versions or [None] * len(users or ())

    def forward(self, sequence: TokenSequence, *, mask_position: MaskPosition = "post") -> Tensor:
        """See `SequenceEncoder.forward`."""
        users, plan = self._users, sequence.row_plan
        shortened = sequence.column_weights is not None
        if users is None or shortened or getattr(sequence, "source", None) is not None:
            if isinstance(plan, ServedPlan):
                sequence = replace(sequence, row_plan=plan.compact())
            encoded: Tensor = self.encoder(sequence, mask_position=mask_position)
            return encoded
        ends = sequence.offsets[1:].tolist()
        counts = sequence.candidates_per_sequence.tolist()
        outputs, start = [], 0
        for place, (end, count) in enumerate(zip(ends, counts, strict=True)):
            history = slice(start, end - count)
            state = self._state(place, sequence.values[history], sequence.marks[history])
            for rows, kept in self._chunks(state, count, _plan_of(sequence, place)):
                tokens = slice(end - count + rows.start, end - count + rows.stop)
                outputs.append(
                    self._candidates(
                        state,
                        sequence.values[tokens],
                        Marks(*sequence.marks[tokens].unbind(1)),
                        kept,
                        mask_position,
                    )
                )
            start = end
        return torch.cat(outputs) if outputs else sequence.values[:0]

    # -- the history --------------------------------------------------------------------------

    def _state(self, place: int, tokens: Tensor, marks: Tensor) -> HistoryState:
        """The state of a request's history: found, extended by what is new, or made."""
        assert self._users is not None
        user, version = self._users[place], self._versions[place]
        source: dict[str, Any] = {"version": version, "history": self._histories[place]}
        found = self.cache.get(user)
        if found is not None and found.is_of(version, marks):
            self.cache.counts.hits += 1
            return found
        if found is not None and found.is_prefix_of(tokens, marks):
            old = len(found.tokens)
            if old == len(tokens):
                self.cache.counts.hits += 1
                if version is not None:  # the same tokens from something else
                    found = replace(found, **source, ready=None)
                    self.cache.put(user, found)
                return found
            if _appends(Marks(*marks.unbind(1)), old):
                self.cache.counts.extended += 1
                state = replace(self._extend(found, tokens, marks), **source)
                self.cache.put(user, state)
                return state
        self.cache.counts.misses += 1
        state = replace(self._extend(None, tokens, marks), **source)
        self.cache.put(user, state)
        return state

    def _extend(self, old: HistoryState | None, tokens: Tensor, marks: Tensor) -> HistoryState:
        """Encode the tokens that come after those of `old`."""
        first = 0 if old is None else len(old.tokens)
        every = Marks(*marks.unbind(1))
        x, keys, values = tokens[first:], [], []
        for depth, layer in enumerate(self.encoder.layers):
            last = depth == len(self.encoder.layers) - 1
            kept: dict[str, Tensor] = {}

            def attend(
                q: Tensor,
                k: Tensor,
                v: Tensor,
                depth: int = depth,
                last: bool = last,
                kept: dict[str, Tensor] = kept,
            ) -> Tensor:
                k, v = self._heads(k).contiguous(), self._heads(v).contiguous()
                if old is not None:
                    k, v = torch.cat([old.keys[depth], k], 1), torch.cat([old.values[depth], v], 1)
                kept.update(k=k, v=v)
                # Nobody reads the history's rows of the last layer.
                return torch.zeros_like(q) if last else self._history_rows(depth, q, k, v, every)

            x = run_layer(layer, x, every.domains[first:], attend)
            keys.append(kept["k"])
            values.append(kept["v"])
        return HistoryState(tokens.clone(), marks.clone(), tuple(keys), tuple(values))

    def _history_rows(self, depth: int, q: Tensor, k: Tensor, v: Tensor, marks: Marks) -> Tensor:
        """The last rows `[T, D]` of a history attend to all of it, `[H, N, d]`."""
        length, new = k.shape[1], len(q)
        columns = torch.arange(length, device=k.device)
        outputs = []
        step = rows_at_once("history", length * self.num_heads, k.device)
        for begin in range(0, new, step):
            rows = columns[length - new :][begin : begin + step]
            seen = marks.key_order < marks.query_order[rows].unsqueeze(1)
            seen = seen | (rows.unsqueeze(1) == columns)
            places = None if self.bias is None else self._places(marks, rows, marks)
            bias = self._bias(depth, places)
            outputs.append(self._dense(q[begin : begin + step], k, v, seen, bias))
        return torch.cat(outputs) if outputs else q

    # -- the candidates -----------------------------------------------------------------------

    def _chunks(
        self, state: HistoryState, count: int, plan: tuple[UserPlan, int] | None
    ) -> Iterator[tuple[slice, Slots | None]]:
        """Some of a user's candidates at a time, and what each keeps; None: everything."""
        kept, width = None, len(state.tokens) * self.num_heads
        if plan is not None:
            user_plan, context = plan
            kept = slots_of(user_plan, context, len(state.tokens), self.num_heads)
            if few(kept):  # a GPU may gather their rows
                slots = kept.index.shape[1] + len(kept.near)
                width = slots * (state.tokens.shape[1] if kept.index.is_cuda else self.num_heads)
        step = rows_at_once("history", width, state.tokens.device)
        if step >= count > 0:
            yield slice(0, count), kept
            return
        for begin in range(0, count, step):
            rows = slice(begin, min(begin + step, count))
            yield rows, None if kept is None else kept.take(rows)

    def _candidates(
        self,
        state: HistoryState,
        x: Tensor,
        marks: Marks,
        kept: Slots | None,
        mask_position: MaskPosition,
    ) -> Tensor:
        """Candidates `[c, D]` through all layers."""
        attend = self._attention(state, marks, kept, mask_position)
        for depth, layer in enumerate(self.encoder.layers):
            x = run_layer(layer, x, marks.domains, functools.partial(attend, depth))
        return x

    def _attention(
        self, state: HistoryState, marks: Marks, kept: Slots | None, mask_position: MaskPosition
    ) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
        """The candidates' attention in the layer of a given depth."""
        history = Marks(*state.marks.unbind(1))
        # Candidates of one request mostly share their time: what depends on it is made once.
        times = torch.stack([marks.query_order, marks.positions, marks.timestamps], 1)
        alike = bool((times == times[:1]).all())
        if kept is None or not few(kept):
            queries = torch.arange(1 if alike else len(times), device=times.device)
            seen = history.key_order < marks.query_order[queries].unsqueeze(1)
            weights = None if kept is None else kept.dense()
            places = None if self.bias is None else self._places(marks, queries, history)

            def attend_all(depth: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                keys, values = state.keys[depth], state.values[depth]
                bias = self._bias(depth, places)
                attended = self._dense(q, keys, values, seen, bias, weights, mask_position)
                return self._own(depth, q, k, v) + attended

            return attend_all
        # A plan keeps only what its candidate sees.
        settings = Settings(self.encoder.alpha, self.encoder.norm_length, mask_position)
        bias = self._slot_bias(marks, history, kept, alike)

        def attend_kept(depth: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = state.keys[depth], state.values[depth]
            of_layer = None
            if bias is not None and self.bias is not None:
                of_layer = replace(bias, table=self.bias.tables[depth])
            return slot_attention((q, k, v), (keys, values), kept, of_layer, settings)

        return attend_kept

    def _slot_bias(self, marks: Marks, history: Marks, kept: Slots, alike: bool) -> SlotBias | None:
        """The relative bias of what candidates keep, in the first layer."""
        if self.bias is None:
            return None
        every = torch.arange(len(kept.index), device=kept.index.device)
        if alike:
            (whole,) = self._places(marks, every[:1], history)
            near, slots = whole[kept.near].unsqueeze(0), whole[kept.index]
        else:
            near = self._places(marks, every, Marks(*(mark[kept.near] for mark in history)))
            slots = self._places(marks, every, Marks(*(mark[kept.index] for mark in history)))
        return SlotBias(self.bias.tables[0], self.bias.own, near, slots)

    def _own(self, depth: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What each candidate takes from itself, with weight 1."""
        queries, keys, values = (x.unflatten(1, (self.num_heads, -1)) for x in (q, k, v))
        scores = (queries * keys).sum(2, keepdim=True).mul_(self.encoder.alpha)
        if self.bias is not None:
            scores += self.bias.itself[depth].to(scores.dtype)
        attention = F.silu(scores, inplace=True).div_(self.encoder.norm_length)
        return (attention * values).flatten(1)

    # -- attention ----------------------------------------------------------------------------

    def _dense(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seen: Tensor,
        bias: Tensor | None,
        weights: Tensor | None = None,
        mask_position: MaskPosition = "post",
    ) -> Tensor:
        """q `[c, D]` over k and v `[H, N, d]`; seen, bias and weights `[c or 1, N]`."""
        scores = self._heads(q * self.encoder.alpha) @ k.transpose(1, 2)
        if bias is not None:
            scores += bias.to(scores.dtype)
        if weights is not None and mask_position == "pre":
            scores *= weights.to(scores.dtype)
        attention = F.silu(scores, inplace=True)
        attention *= seen.to(scores.dtype) / self.encoder.norm_length
        if weights is not None and mask_position == "post":
            attention *= weights.to(scores.dtype)
        return (attention.to(v.dtype) @ v).transpose(0, 1).flatten(1)

    def _heads(self, x: Tensor) -> Tensor:
        """`[T, D]` to `[H, T, d]`."""
        return x.unflatten(1, (self.num_heads, -1)).transpose(0, 1)

    def _bias(self, depth: int, places: Tensor | None) -> Tensor | None:
        """The relative bias of a layer at `places`, in their shape."""
        return None if places is None or self.bias is None else self.bias.tables[depth][places]

    def _places(self, queries: Marks, rows: Tensor, keys: Marks) -> Tensor:
        """Places in the bias table of some query rows over keys `[N]` or `[r, N]`, `[r, N]`."""
        assert self.encoder.bias is not None
        positions, times = queries.positions[rows], queries.timestamps[rows]
        return bias_places(
            positions.unsqueeze(1) - keys.positions,
            (times.unsqueeze(1) - keys.timestamps).abs(),
            self.encoder.bias(0),
        )


def take_cached_rows(encoder: SequenceEncoder) -> None:
    """Let the layers of a trained encoder take `CachedRows` as well."""
    for layer in encoder.layers:
        layer.attend = _Attend(layer)  # type: ignore[assignment]


def run_layer(layer: nn.Module, x: Tensor, domains: Tensor, attend_rows: Any) -> Tensor:
    """Tokens `[T, D]` through a layer that takes `CachedRows`, of which nothing else is read."""
    spec = cached_rows(domains, attend_rows)
    encoded: Tensor = layer(x, domains=domains, spec=spec, bias=None)
    return encoded


def cached_rows(domains: Tensor, attend_rows: Any) -> CachedRows:
    """For tokens of these domains."""
    return CachedRows(
        offsets=domains[:1], max_length=1, alpha=1.0, norm_length=1.0, attend_rows=attend_rows
    )


class _Attend:
    """A layer's attention, or what `CachedRows` has in its place."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, bias: PositionTimeBias | None
    ) -> Tensor:
        if isinstance(spec, CachedRows):
            attended: Tensor = spec.attend_rows(q, k, v)
            return attended
        assert isinstance(self.layer, SequenceLayer)
        return SequenceLayer.attend(self.layer, q, k, v, spec, bias)


def _plan_of(sequence: TokenSequence, place: int) -> tuple[UserPlan, int] | None:
    """The plan of one request, and how many context tokens come before its history."""
    plan: PreferencePlan | ServedPlan | None = sequence.row_plan
    if plan is None or sequence.parts is None:
        return None
    context = sequence.parts.contextual_len
    if isinstance(plan, ServedPlan):
        return plan.users[place], context
    first, start = sequence.parts.history_offsets[place], sequence.parts.candidate_offsets
    return UserPlan.of(plan, slice(*start[place : place + 2].tolist()), first), context


def slots_of(plan: UserPlan, context: int, num_rows: int, num_heads: int) -> Slots:
    """The rows that a plan keeps, behind the context tokens, all of which are read.

    Args:
        plan: of one user.
        context: tokens in front of the history.
        num_rows: tokens of context and history.
        num_heads: of the attention.
    """
    near = near_rows(plan.recent, context, plan.places.device)
    places = plan.places + context if context else plan.places
    return Slots(near, places, plan.weights, num_rows, num_heads)


def near_rows(recent: range, context: int, device: torch.device) -> Tensor:
    """The tokens that all candidates read: context, and these places of the history."""
    near = torch.arange(context + recent.start, context + recent.stop, device=device)
    return torch.cat([torch.arange(context, device=device), near]) if context else near


def few(kept: Slots) -> bool:
    """Whether gathering the slots costs less than a product with all rows."""
    return 2 * kept.index.shape[1] < kept.num_rows


def _appends(marks: Marks, old: int) -> bool:
    """Whether none of the first `old` tokens sees one of those after them."""
    if old == 0:
        return True
    return bool((marks.key_order[old:].min() >= marks.query_order[:old].max()).item())
