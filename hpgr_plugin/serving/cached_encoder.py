"""The encoder at serving time: a history's keys and values once, candidates against kept rows.

History and context tokens never see candidates, so their keys and values depend on nothing else
of the request. Candidates see the history and themselves: a request with C candidates costs
`O(C n)` with a dense history of n items, and `O(C m)` where a plan keeps m of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpgr_plugin.hosts.embedded.model.encoder import SequenceEncoder
from hpgr_plugin.hosts.embedded.model.hstu import SequenceLayer
from hpgr_plugin.hosts.embedded.model.tokens import Marks, TokenSequence
from hpgr_plugin.ops.hstu_attention import AttentionSpec, MaskPosition, PositionTimeBias
from hpgr_plugin.ops.jagged import segment_ids
from hpgr_plugin.serving.bias import position_time_bias
from hpgr_plugin.serving.history_cache import HistoryCache, HistoryState
from hpgr_plugin.serving.sparse_attention import KeptRows, kept_scores, kept_sums

_CHUNK_ELEMENTS = 2**22  # scores, or gathered numbers, at once


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
        first: Any = encoder.layers[0]
        self.num_heads: int = first.num_heads
        take_cached_rows(encoder)

    def for_users(self, users: Sequence[Hashable] | None) -> None:
        """Whose histories the next batch holds, one key per request; None: nothing is kept."""
        self._users = users

    def forward(self, sequence: TokenSequence, *, mask_position: MaskPosition = "post") -> Tensor:
        """See `SequenceEncoder.forward`."""
        users = self._users
        shortened = sequence.column_weights is not None
        if users is None or shortened or getattr(sequence, "source", None) is not None:
            encoded: Tensor = self.encoder(sequence, mask_position=mask_position)
            return encoded
        ends = sequence.offsets[1:].tolist()
        counts = sequence.candidates_per_sequence.tolist()
        outputs, start, candidate = [], 0, 0
        for user, end, count in zip(users, ends, counts, strict=True):
            history = slice(start, end - count)
            state = self._state(user, sequence.values[history], sequence.marks[history])
            chosen = slice(candidate, candidate + count)
            for rows, kept in self._chunks(sequence, state, chosen):
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
            start, candidate = end, candidate + count
        return torch.cat(outputs) if outputs else sequence.values[:0]

    # -- the history --------------------------------------------------------------------------

    def _state(self, user: Hashable, tokens: Tensor, marks: Tensor) -> HistoryState:
        """The state of this history: found, extended by what is new, or made."""
        found = self.cache.get(user)
        if found is not None and found.is_prefix_of(tokens, marks):
            old = len(found.tokens)
            if old == len(tokens):
                self.cache.counts.hits += 1
                return found
            if _appends(Marks(*marks.unbind(1)), old):
                self.cache.counts.extended += 1
                state = self._extend(found, tokens, marks)
                self.cache.put(user, state)
                return state
        self.cache.counts.misses += 1
        state = self._extend(None, tokens, marks)
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

            x = self._layer(layer, x, every.domains[first:], depth, attend)
            keys.append(kept["k"])
            values.append(kept["v"])
        return HistoryState(tokens.clone(), marks.clone(), tuple(keys), tuple(values))

    def _history_rows(self, depth: int, q: Tensor, k: Tensor, v: Tensor, marks: Marks) -> Tensor:
        """The last rows `[T, D]` of a history attend to all of it, `[H, N, d]`."""
        length, new = k.shape[1], len(q)
        columns = torch.arange(length, device=k.device)
        outputs = []
        step = max(1, _CHUNK_ELEMENTS // max(1, length * self.num_heads))
        for begin in range(0, new, step):
            rows = columns[length - new :][begin : begin + step]
            seen = marks.key_order < marks.query_order[rows].unsqueeze(1)
            seen = seen | (rows.unsqueeze(1) == columns)
            bias = self._bias(depth, marks, rows, marks)
            outputs.append(self._dense(q[begin : begin + step], k, v, seen, bias))
        return torch.cat(outputs) if outputs else q

    # -- the candidates -----------------------------------------------------------------------

    def _chunks(
        self, sequence: TokenSequence, state: HistoryState, chosen: slice
    ) -> Iterator[tuple[slice, KeptRows | None]]:
        """Some of a user's candidates at a time, and what each keeps; None: everything."""
        count, length = chosen.stop - chosen.start, len(state.tokens)
        plan, parts = sequence.row_plan, sequence.parts
        if plan is None or parts is None:
            step = max(1, _CHUNK_ELEMENTS // max(1, length * self.num_heads))
            for begin in range(0, count, step):
                yield slice(begin, min(begin + step, count)), None
            return
        if not count:
            return
        user = segment_ids(parts.candidate_offsets, parts.num_candidates)[chosen.start]
        shift = parts.contextual_len - parts.history_offsets[user]
        kept = KeptRows.of(plan, chosen, shift, parts.contextual_len)
        width = max(1, int(kept.offsets.diff().max()) * state.tokens.shape[1])
        step = max(1, _CHUNK_ELEMENTS // width)
        if step >= count:
            yield slice(0, count), kept
            return
        for begin in range(0, count, step):
            rows = slice(begin, min(begin + step, count))
            yield rows, kept.take(rows)

    def _candidates(
        self,
        state: HistoryState,
        x: Tensor,
        marks: Marks,
        kept: KeptRows | None,
        mask_position: MaskPosition,
    ) -> Tensor:
        """Candidates `[c, D]` through all layers."""
        history = Marks(*state.marks.unbind(1))
        # Candidates of one request mostly share their time: what depends on it is made once.
        places = torch.stack([marks.query_order, marks.positions, marks.timestamps], 1)
        alike = bool((places == places[:1]).all())
        rows = torch.arange(1 if alike else len(x), device=x.device)
        if kept is None:
            seen = history.key_order < marks.query_order[rows].unsqueeze(1)
        else:
            seen = history.key_order[kept.index] < marks.query_order[kept.rows]
        for depth, layer in enumerate(self.encoder.layers):

            def attend(q: Tensor, k: Tensor, v: Tensor, depth: int = depth) -> Tensor:
                bias = self._bias(depth, marks, rows, history)
                keys, values = state.keys[depth], state.values[depth]
                own = self._own(depth, q, k, v)
                if kept is None:
                    return own + self._dense(q, keys, values, seen, bias)
                if bias is not None:
                    bias = bias[0][kept.index] if alike else bias[kept.rows, kept.index]
                return own + self._kept(q, keys, values, kept, seen, bias, mask_position)

            x = self._layer(layer, x, marks.domains, depth, attend)
        return x

    def _own(self, depth: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What each candidate takes from itself, with weight 1."""
        queries, keys, values = (x.unflatten(1, (self.num_heads, -1)) for x in (q, k, v))
        scores = (queries * self.encoder.alpha * keys).sum(2, keepdim=True)
        tables = self._tables(depth)
        if tables is not None:
            zero = torch.zeros(1, 1, dtype=torch.int64, device=q.device)
            scores = scores + position_time_bias(zero, zero, tables).to(scores.dtype).unsqueeze(2)
        attention = F.silu(scores) / self.encoder.norm_length
        return (attention * values).flatten(1)

    # -- attention ----------------------------------------------------------------------------

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor | None) -> Tensor:
        """q `[c, D]` over k and v `[H, N, d]`; seen and bias `[c or 1, N]`."""
        scores = self._heads(q * self.encoder.alpha) @ k.transpose(1, 2)
        if bias is not None:
            scores += bias.to(scores.dtype)
        attention = F.silu(scores, inplace=True)
        attention *= seen.to(scores.dtype) / self.encoder.norm_length
        return (attention.to(v.dtype) @ v).transpose(0, 1).flatten(1)

    def _kept(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kept: KeptRows,
        seen: Tensor,
        bias: Tensor | None,
        mask_position: MaskPosition,
    ) -> Tensor:
        """q `[c, D]`, each over its own rows of k and v `[H, N, d]`; seen and bias `[P]`."""
        scores = kept_scores(self._heads(q * self.encoder.alpha).contiguous(), k, kept)
        if bias is not None:
            scores = scores + bias.to(scores.dtype)
        weights = kept.weights.to(scores.dtype)
        gain = seen.to(scores.dtype) / self.encoder.norm_length
        if mask_position == "pre":
            scores = scores * weights
        else:
            gain = gain * weights
        return kept_sums((F.silu(scores) * gain).to(v.dtype), v, kept)

    def _heads(self, x: Tensor) -> Tensor:
        """`[T, D]` to `[H, T, d]`."""
        return x.unflatten(1, (self.num_heads, -1)).transpose(0, 1)

    def _tables(self, depth: int) -> PositionTimeBias | None:
        return None if self.encoder.bias is None else self.encoder.bias(depth)

    def _bias(self, depth: int, queries: Marks, rows: Tensor, keys: Marks) -> Tensor | None:
        """The relative bias of some query rows over all keys, `[r, N]`."""
        tables = self._tables(depth)
        if tables is None:
            return None
        positions, times = queries.positions[rows], queries.timestamps[rows]
        return position_time_bias(
            positions.unsqueeze(1) - keys.positions,
            (times.unsqueeze(1) - keys.timestamps).abs(),
            tables,
        )

    def _layer(
        self, layer: nn.Module, x: Tensor, domains: Tensor, depth: int, attend: Any
    ) -> Tensor:
        offsets = torch.tensor([0, len(x)], device=x.device)
        rows = CachedRows(
            offsets=offsets,
            max_length=len(x),
            alpha=self.encoder.alpha,
            norm_length=self.encoder.norm_length,
            attend_rows=attend,
        )
        encoded: Tensor = layer(x, domains=domains, spec=rows, bias=None)
        return encoded


def take_cached_rows(encoder: SequenceEncoder) -> None:
    """Let the layers of a trained encoder take `CachedRows` as well."""
    for layer in encoder.layers:
        layer.attend = _Attend(layer)  # type: ignore[assignment]


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


def _appends(marks: Marks, old: int) -> bool:
    """Whether none of the first `old` tokens sees one of those after them."""
    if old == 0:
        return True
    return bool((marks.key_order[old:].min() >= marks.query_order[:old].max()).item())
