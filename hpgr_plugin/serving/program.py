"""The served model as one function of padded tensors, for `torch.export` and AOTInductor.

The trained model works on jagged tensors, whose shapes depend on data. Here requests are padded,
and shapes depend on three sizes only: requests B, longest history N and candidates C. What has no
such form is refused by its name.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from hpgr_plugin.components.attention_hooks import PreferenceGuidedSparseAttention
from hpgr_plugin.components.positions import TimeAwarePositionalEncoder
from hpgr_plugin.data.batch import Batch
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.embedded.model.encoder import SequenceEncoder
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker
from hpgr_plugin.hosts.embedded.model.tokens import NEVER_SEEN, Domain
from hpgr_plugin.ops.hstu_attention.buckets import buckets_by_distance
from hpgr_plugin.ops.preference_plan.plan import gaussian_kernel
from hpgr_plugin.ops.preference_plan.torch import _column_weights
from hpgr_plugin.serving.bias import position_time_bias
from hpgr_plugin.serving.cached_encoder import run_layer, take_cached_rows

MOST_REQUESTS, MOST_CANDIDATES = 4096, 65_536
_PARTS = (
    *("item_table", "action_table", "user_features", "item_features", "positional_encoder"),
    *("input_dropout", "attention_hook", "encoder", "head", "item_bias", "token_features"),
    "task_heads",
)


class ProgramError(HpgrError):
    """A model that cannot be exported; the message names the part."""


class ProgramInputs(NamedTuple):
    """B requests, padded to N history items; each has C candidates.

    Attributes:
        history_items, history_times, history_actions: int64 `[B, N]`, codes and seconds, ascending
            in time; what lies behind a history's end is any code.
        history_lengths: int64 `[B]`.
        candidates, candidate_times: int64 `[B, C]`; to pad, repeat one.
        user_features: int64 `[B, F]`, codes in the order of the features' names; F may be 0.
    """

    history_items: Tensor
    history_times: Tensor
    history_actions: Tensor
    history_lengths: Tensor
    candidates: Tensor
    candidate_times: Tensor
    user_features: Tensor

    @classmethod
    def of(cls, batch: Batch) -> ProgramInputs:
        """From a batch whose requests have equally many candidates.

        Raises:
            ProgramError: they have not.
        """
        size, counts = batch.num_requests, batch.candidate_offsets.diff().unique()
        if len(counts) != 1:
            raise ProgramError(f"requests need equally many candidates, got {counts.tolist()}")
        lengths = batch.history_offsets.diff()
        longest = int(lengths.max())

        def padded(values: Tensor) -> Tensor:
            dense = values.new_zeros(size, longest)
            dense[torch.arange(longest, device=values.device) < lengths.unsqueeze(1)] = values
            return dense

        names = sorted(batch.user_features)
        features = [batch.user_features[name] for name in names]
        return cls(
            padded(batch.history_items),
            padded(batch.history_timestamps),
            padded(batch.history_actions),
            lengths,
            batch.candidate_items.view(size, -1),
            batch.candidate_timestamps.view(size, -1),
            torch.stack(features, 1) if names else lengths.new_zeros(size, 0),
        )


class _Tokens(NamedTuple):
    """What attention reads of tokens, int64 `[B, T]` each."""

    positions: Tensor
    times: Tensor
    key_order: Tensor
    query_order: Tensor
    domains: Tensor


class PaddedRanker(nn.Module):
    """Probabilities `[B, C]` of padded requests, equal to the trained model's.

    With further tasks they are `[B, C, 1 + tasks]`, the main one first.

    Args:
        model: in evaluation mode; its layers are used, and changed to take `CachedRows`.

    Raises:
        ProgramError: a part of the model has no padded form.
    """

    buckets: Tensor
    kernel: Tensor

    def __init__(self, model: HSTURanker) -> None:
        super().__init__()
        _refuse(model)
        assert isinstance(model.encoder, SequenceEncoder)
        self.model = model
        self.encoder = model.encoder
        take_cached_rows(self.encoder)
        first: Any = self.encoder.layers[0]
        self.num_heads: int = first.num_heads
        self.hook: Any = model.attention_hook
        if isinstance(self.hook, PreferenceGuidedSparseAttention):
            settings = self.hook.settings
            kernel = gaussian_kernel(settings.sigma, settings.eps, model.max_history)
            kernel = kernel.float().to(model.item_table.weight.device)
            self.register_buffer("kernel", kernel, persistent=False)
        if self.encoder.bias is not None:
            buckets = buckets_by_distance(self.encoder.bias(0), model.item_table.weight.device)
            self.register_buffer("buckets", buckets, persistent=False)

    def forward(
        self,
        history_items: Tensor,
        history_times: Tensor,
        history_actions: Tensor,
        history_lengths: Tensor,
        candidates: Tensor,
        candidate_times: Tensor,
        user_features: Tensor,
    ) -> Tensor:
        """See `ProgramInputs`."""
        rank = torch.arange(history_items.shape[1], device=history_items.device)
        real = rank < history_lengths.unsqueeze(1)
        before = history_times.unsqueeze(1) < candidate_times.unsqueeze(2)
        seen = before & real.unsqueeze(1)  # [B, C, N]
        visible = seen.sum(2)
        raw = self.model.embed_items(history_items), self.model.embed_items(candidates)
        weights = self._plan(*raw, seen)
        history, options = self._with_features(
            *self._with_positions(*raw, rank, visible),
            history_items,
            history_actions,
            candidates,
        )
        tokens = self._history_tokens(real, rank, history_times, visible)
        history, tokens = self._with_context(history, tokens, user_features)
        own = _Tokens(
            visible + 1,
            candidate_times,
            torch.full_like(visible, NEVER_SEEN),
            visible,
            torch.full_like(visible, int(Domain.CANDIDATE)),
        )
        context = history.shape[1] - history_items.shape[1]
        encoded = self._encode(
            history, options, tokens, own, F.pad(weights, (context, 0), value=1.0)
        )
        logits = self.model.head(encoded).squeeze(2)
        if self.model.item_bias is not None:
            logits = logits + self.model.item_bias(candidates).squeeze(2)
        if self.model.task_names:
            further = self.model.task_heads.logits(encoded, candidates)
            logits = torch.stack([logits, *further], 2)
        return logits.sigmoid()

    # -- tokens -------------------------------------------------------------------------------

    def _plan(self, history: Tensor, candidates: Tensor, seen: Tensor) -> Tensor:
        """M `[B, C, N]`; ones without PGSA."""
        hook = self.hook
        if not isinstance(hook, PreferenceGuidedSparseAttention):
            return torch.ones_like(seen, dtype=history.dtype)
        if hook.score == "cosine":
            history, candidates = (F.normalize(x, dim=2) for x in (history, candidates))
        # Not a matrix product: it may round two equal items differently.
        scores = (history.unsqueeze(1) * candidates.unsqueeze(2)).sum(3)
        scores = scores.masked_fill(~seen, -torch.inf)
        settings = hook.settings
        weights = _column_weights(
            scores.flatten(0, 1),
            seen.flatten(0, 1),
            settings.top_k,
            settings.recent,
            self.kernel,
        )
        return weights.view(scores.shape)

    def _with_positions(
        self, history: Tensor, candidates: Tensor, rank: Tensor, visible: Tensor
    ) -> tuple[Tensor, Tensor]:
        encoder: Any = self.model.positional_encoder
        if isinstance(encoder, TimeAwarePositionalEncoder):
            if encoder.form == "relative":
                return history, candidates
            return history + encoder.table(rank), candidates + encoder.table(visible)
        return history + encoder.table(rank + 1), candidates + encoder.table.weight[0]

    def _with_features(
        self, history: Tensor, candidates: Tensor, items: Tensor, actions: Tensor, options: Tensor
    ) -> tuple[Tensor, Tensor]:
        model = self.model
        if model.action_table is not None:
            history = history + model.action_table(actions)
        if model.item_features is not None:
            history = history + model.item_features(items)
            candidates = candidates + model.item_features(options)
        return history * model.input_scale, candidates * model.input_scale

    def _history_tokens(
        self, real: Tensor, rank: Tensor, times: Tensor, visible: Tensor
    ) -> _Tokens:
        """Orders as in `hosts/embedded/model/tokens.py`; nothing sees padding."""
        ranks = rank.expand_as(times)
        key, query = ranks, ranks
        domains = torch.full_like(ranks, int(Domain.HISTORY))
        if self.model.dynamic_mask:
            static = ranks < visible.amin(1, keepdim=True)
            key, query = torch.where(static, -1, ranks), torch.where(static, 0, ranks)
            domains = torch.where(static, int(Domain.HISTORY), int(Domain.REALTIME))
        key = torch.where(real, key, NEVER_SEEN)
        return _Tokens(ranks + 1, times, key, query, domains)

    def _with_context(
        self, history: Tensor, tokens: _Tokens, user_features: Tensor
    ) -> tuple[Tensor, _Tokens]:
        """The users' context tokens in front of their history."""
        if self.model.user_features is None:
            return history, tokens
        tables = self.model.user_features.tables.values()
        columns = [table(user_features[:, place]) for place, table in enumerate(tables)]
        context = torch.stack(columns, 1) * self.model.input_scale
        fills = _Tokens(0, 0, -1, 0, int(Domain.CONTEXT))  # type: ignore[arg-type]
        padded = (
            F.pad(part, (context.shape[1], 0), value=fill)  # type: ignore[arg-type]
            for part, fill in zip(tokens, fills, strict=True)
        )
        return torch.cat([context, history], 1), _Tokens(*padded)

    # -- layers -------------------------------------------------------------------------------

    def _encode(
        self, history: Tensor, candidates: Tensor, tokens: _Tokens, own: _Tokens, weights: Tensor
    ) -> Tensor:
        """Candidates `[B, C, D]` through all layers."""
        place = torch.arange(history.shape[1], device=history.device)
        inside = tokens.key_order.unsqueeze(1) < tokens.query_order.unsqueeze(2)
        inside = inside | (place.unsqueeze(1) == place)
        seen = tokens.key_order.unsqueeze(1) < own.query_order.unsqueeze(2)
        final, shapes = len(self.encoder.layers) - 1, (history.shape, candidates.shape)
        for depth, layer in enumerate(self.encoder.layers):
            kept: dict[str, Tensor] = {}

            def of_history(
                q: Tensor, k: Tensor, v: Tensor, depth: int = depth, kept: dict = kept
            ) -> Tensor:
                q, k, v = (self._heads(x, shapes[0]) for x in (q, k, v))
                kept.update(k=k, v=v)
                if depth == final:  # nobody reads these rows
                    return torch.zeros_like(q).transpose(1, 2).flatten(2).flatten(0, 1)
                scores = self._scores(q, k, depth, tokens, tokens)
                attention = F.silu(scores) * self._gain(inside, scores)
                return (attention @ v).transpose(1, 2).flatten(2).flatten(0, 1)

            def of_candidates(
                q: Tensor, k: Tensor, v: Tensor, depth: int = depth, kept: dict = kept
            ) -> Tensor:
                q, k, v = (self._heads(x, shapes[1]) for x in (q, k, v))
                scores = self._scores(q, kept["k"], depth, own, tokens)
                gain = self._gain(seen, scores)
                if self.hook is not None and self.hook.mask_position == "pre":
                    scores = scores * weights.unsqueeze(1)
                else:
                    gain = gain * weights.unsqueeze(1)
                among = (F.silu(scores) * gain) @ kept["v"]
                itself = (q * self.encoder.alpha * k).sum(3, keepdim=True) + self._own_bias(depth)
                total = among + F.silu(itself) / self.encoder.norm_length * v
                return total.transpose(1, 2).flatten(2).flatten(0, 1)

            history, candidates = (
                run_layer(layer, x.flatten(0, 1), part.domains.flatten(), attend).view(x.shape)
                for x, part, attend in (
                    (history, tokens, of_history),
                    (candidates, own, of_candidates),
                )
            )
        return candidates

    def _heads(self, x: Tensor, shape: torch.Size) -> Tensor:
        """`[B * T, D]` to `[B, H, T, d]`."""
        return x.view(shape).unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def _scores(self, q: Tensor, k: Tensor, depth: int, of: _Tokens, over: _Tokens) -> Tensor:
        scores = (q * self.encoder.alpha) @ k.transpose(2, 3)
        if self.encoder.bias is None:
            return scores
        distance = of.positions.unsqueeze(2) - over.positions.unsqueeze(1)
        seconds = (of.times.unsqueeze(2) - over.times.unsqueeze(1)).abs()
        tables = self.encoder.bias(depth)
        bias = position_time_bias(distance, seconds, tables, self.buckets)
        return scores + bias.unsqueeze(1)

    def _own_bias(self, depth: int) -> Tensor | float:
        """The bias at no distance in places and time."""
        if self.encoder.bias is None:
            return 0.0
        tables = self.encoder.bias(depth)
        return tables.position_table[0] + tables.time_table[0]

    def _gain(self, seen: Tensor, scores: Tensor) -> Tensor:
        return seen.unsqueeze(1).to(scores.dtype) / self.encoder.norm_length


def export_program(model: HSTURanker, *, example: ProgramInputs | None = None) -> ExportedProgram:
    """The model as an exported program that takes any B, N and C.

    Args:
        model: in evaluation mode.
        example: requests to trace with; at least two, with two items and two candidates.

    Raises:
        ProgramError: a part of the model has no padded form.
    """
    padded = PaddedRanker(model).eval()
    requests = Dim("requests", min=1, max=MOST_REQUESTS)
    items = Dim("items", min=shortest_history(model), max=model.max_history)
    candidates = Dim("candidates", min=1, max=MOST_CANDIDATES)
    of_history, of_candidates = {0: requests, 1: items}, {0: requests, 1: candidates}
    shapes = {
        "history_items": of_history,
        "history_times": of_history,
        "history_actions": of_history,
        "history_lengths": {0: requests},
        "candidates": of_candidates,
        "candidate_times": of_candidates,
        "user_features": {0: requests},
    }
    inputs = example_inputs(model) if example is None else example
    with torch.no_grad():
        return torch.export.export(padded, tuple(inputs), dynamic_shapes=shapes)


def example_inputs(model: HSTURanker) -> ProgramInputs:
    """Some requests that the model takes."""
    device = model.item_table.weight.device
    size, length, count = 3, min(model.max_history, shortest_history(model) + 5), 4
    features = 0 if model.user_features is None else model.user_features.tokens_per_user

    def codes(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=device)

    times = torch.arange(length, device=device).expand(size, -1).contiguous()
    return ProgramInputs(
        codes(size, length),
        times,
        codes(size, length),
        torch.full((size,), length, device=device),
        codes(size, count),
        codes(size, count) + length,
        codes(size, features),
    )


def shortest_history(model: HSTURanker) -> int:
    """The smallest N of a program: shorter histories are padded to it."""
    hook = model.attention_hook
    anchors = hook.settings.top_k if isinstance(hook, PreferenceGuidedSparseAttention) else 0
    return max(2, anchors)


def pad_history(inputs: ProgramInputs, length: int) -> ProgramInputs:
    """Inputs with a longest history of at least `length`."""
    missing = max(0, length - inputs.history_items.shape[1])
    longer = {
        name: F.pad(getattr(inputs, name), (0, missing))
        for name in ("history_items", "history_times", "history_actions")
    }
    return inputs._replace(**longer)


def _refuse(model: HSTURanker) -> None:
    """Name the first part of the model that has no padded form."""
    hook = model.attention_hook
    parts = {
        "hpgr.HSTURanker.encoder": not isinstance(model.encoder, SequenceEncoder),
        "hpgr.HSTURanker.sem": model.sem is not None,
        "hpgr.HSTURanker.token_features": len(model.token_features) > 0,
        "hpgr.HSTURanker.rare_items": model.rare_items is not None,
        "hpgr.HSTURanker.statistics": model.reads_statistics,
        "hpgr.TimeAwarePositionalEncoder.hide_future = False": not model.hide_future,
    }
    if isinstance(hook, PreferenceGuidedSparseAttention):
        name = "hpgr.PreferenceGuidedSparseAttention"
        parts[f"{name}.layout = {hook.layout!r}"] = hook.layout != "shared_history"
        parts[f"{name}.table = 'frozen'"] = hook.table == "frozen"
    elif hook is not None:
        parts["hpgr.HSTURanker.attention_hook"] = True
    for name, _ in model.named_children():  # a part that this file does not know of
        parts[f"{type(model).__name__}.{name}"] = name not in _PARTS
    refused = next((name for name, found in parts.items() if found), None)
    if refused is not None:
        raise ProgramError(
            f"{refused} has no form with fixed shapes, so this model cannot be exported as a "
            "program; the scorer serves it"
        )
