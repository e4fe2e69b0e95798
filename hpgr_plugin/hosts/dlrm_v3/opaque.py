"""Operators whose insides depend on data, as single nodes of an exported program.

`torch.export` follows shapes, and a plan, sessions or buckets have sizes that only data tell. Here
each such part is one operator of torch's library, with the sizes of its results declared. At run
time it is the function that the model itself calls, so a program needs this package to run.
"""

import functools
import json
from typing import Any

import torch
from torch import Tensor, nn

from hpgr_plugin.components.sem import SessionContext, SessionEnhancementModule
from hpgr_plugin.ops.compact.parts import SequenceParts, visible_plan
from hpgr_plugin.ops.hstu_attention import AttentionSpec, hstu_attention
from hpgr_plugin.ops.jagged import complete_cumsum, ranges, segment_ids
from hpgr_plugin.ops.preference_plan import (
    PlanSettings,
    PreferencePlan,
    count_earlier,
    plan_preferences,
)
from hpgr_plugin.transfer.handoff import sem_settings


@torch.library.custom_op("hpgr::plan_preferences", mutates_args=())
def _plan(
    history: Tensor,
    candidates: Tensor,
    history_offsets: Tensor,
    candidate_offsets: Tensor,
    history_times: Tensor | None,
    candidate_times: Tensor | None,
    top_k: int,
    sigma: float,
    eps: float,
    recent: int,
) -> tuple[Tensor, Tensor, Tensor]:
    plan = plan_preferences(
        history,
        candidates,
        history_offsets,
        candidate_offsets,
        top_k,
        sigma,
        eps,
        recent,
        history_times,
        candidate_times,
    )
    # The index of the Triton backend may be longer than what its offsets say.
    return plan.index.clone().long(), plan.weights.clone(), plan.offsets.clone().long()


@_plan.register_fake
def _(history: Tensor, candidates: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    kept = torch.library.get_ctx().new_dynamic_size()
    integers = candidates.new_empty(0, dtype=torch.int64)
    exact = torch.promote_types(history.dtype, torch.float32)
    return (
        integers.new_empty(kept),
        candidates.new_empty(kept, dtype=exact),
        integers.new_empty(candidates.shape[0] + 1),
    )


def traced_plan(
    *embeddings_and_offsets: Tensor,
    history_timestamps: Tensor | None = None,
    candidate_timestamps: Tensor | None = None,
    max_history: int | None = None,
    max_candidates: int | None = None,
    **settings: Any,
) -> PreferencePlan:
    """`plan_preferences` as one node, its settings by name; the operator needs no bounds."""
    times = history_timestamps, candidate_timestamps
    return PreferencePlan(*_plan(*embeddings_and_offsets, *times, *PlanSettings(**settings)))


@torch.library.custom_op("hpgr::count_earlier", mutates_args=())
def _earlier(
    history_times: Tensor, history_offsets: Tensor, times: Tensor, offsets: Tensor
) -> Tensor:
    return count_earlier(history_times, history_offsets, times, offsets).clone()


@_earlier.register_fake
def _(_: Tensor, __: Tensor, times: Tensor, ___: Tensor) -> Tensor:
    return times.new_empty(times.shape[0], dtype=torch.int64)


def traced_count_earlier(
    history_timestamps: Tensor,
    history_offsets: Tensor,
    candidate_timestamps: Tensor,
    candidate_offsets: Tensor,
    **_: Any,
) -> Tensor:
    """`count_earlier` as one node."""
    return _earlier(history_timestamps, history_offsets, candidate_timestamps, candidate_offsets)


@torch.library.custom_op("hpgr::visible_plan", mutates_args=())
def _visible(
    history_times: Tensor, candidate_times: Tensor, history_offsets: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    parts = SequenceParts(
        history_offsets + offsets,
        history_offsets,
        offsets,
        contextual_len=0,
        num_history=history_times.numel(),
        num_candidates=candidate_times.numel(),
    )
    plan = visible_plan(history_times, candidate_times, parts)
    if plan is None:  # nothing is hidden from any candidate
        users = segment_ids(offsets, candidate_times.numel())
        lengths = history_offsets.diff()[users]
        index = ranges(history_offsets[:-1][users], lengths)
        weights = torch.ones(index.numel(), device=index.device)
        plan = PreferencePlan(index, weights, complete_cumsum(lengths))
    return plan.index, plan.weights, plan.offsets


@_visible.register_fake
def _(_: Tensor, candidate_times: Tensor, *__: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    seen = torch.library.get_ctx().new_dynamic_size()
    integers = candidate_times.new_empty(0, dtype=torch.int64)
    return (
        integers.new_empty(seen),
        integers.new_empty(seen, dtype=torch.float32),
        integers.new_empty(candidate_times.shape[0] + 1),
    )


def traced_visible_plan(
    history_timestamps: Tensor, candidate_timestamps: Tensor, parts: SequenceParts
) -> PreferencePlan:
    """`visible_plan` as one node; where it would be None, every item with weight 1."""
    offsets = parts.history_offsets, parts.candidate_offsets
    return PreferencePlan(*_visible(history_timestamps, candidate_timestamps, *offsets))


@torch.library.custom_op("hpgr::candidate_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    query_offsets: Tensor,
    row_weights: Tensor | None,
    column_weights: Tensor | None,
    num_targets: Tensor | None,
    max_length: int,
    max_query_length: int,
    alpha: float,
    causal: bool,
    mask_position: str,
) -> Tensor:
    spec = AttentionSpec(
        offsets=offsets,
        max_length=max_length,
        alpha=alpha,
        norm_length=1.0,
        causal=causal,
        query_offsets=query_offsets,
        max_query_length=max_query_length,
        num_targets=num_targets,
        column_weights=column_weights,
        row_weights=row_weights,
        mask_position=mask_position,  # type: ignore[arg-type]
        exact=True,
    )
    return hstu_attention(q, k, v, spec).clone()


@_attention.register_fake
def _(q: Tensor, _: Tensor, v: Tensor, *__: Any) -> Tensor:
    return v.new_empty(q.shape[0], q.shape[1], v.shape[2])


def traced_attention(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """`hstu_attention` of candidates over their sequences as one node."""
    assert spec.query_offsets is not None
    summed = _attention(
        q,
        k,
        v,
        spec.offsets,
        spec.query_offsets,
        spec.row_weights,
        spec.column_weights,
        spec.num_targets,
        spec.max_length,
        spec.query_length,
        spec.alpha,
        spec.causal,
        spec.mask_position,
    )
    return summed / spec.norm_length  # an operator takes no symbolic fraction


class _Context(nn.Module):
    """SEM's context as a forward, for `functional_call`."""

    def __init__(self, sem: SessionEnhancementModule) -> None:
        super().__init__()
        self.sem = sem

    def forward(self, embeddings: Tensor, offsets: Tensor, times: Tensor) -> SessionContext:
        return self.sem.context(embeddings, offsets, times)


@functools.lru_cache(maxsize=16)
def _context_module(settings: str) -> _Context:
    with torch.device("meta"):  # the weights are given; this draws no random numbers
        return _Context(SessionEnhancementModule(**json.loads(settings))).eval()


@torch.library.custom_op("hpgr::session_context", mutates_args=())
def _context(
    embeddings: Tensor, offsets: Tensor, times: Tensor, weights: list[Tensor], settings: str
) -> tuple[Tensor, Tensor, Tensor]:
    module = _context_module(settings)
    names = [name for name, _ in module.named_parameters()]
    given = dict(zip(names, weights, strict=True))
    context = torch.func.functional_call(module, given, (embeddings, offsets, times))
    own = context.summary[:0] if context.own is None else context.own
    return context.summary.clone(), context.session_offsets.clone(), own.clone()


@_context.register_fake
def _(
    embeddings: Tensor, offsets: Tensor, times: Tensor, weights: list[Tensor], settings: str
) -> tuple[Tensor, Tensor, Tensor]:
    sessions = torch.library.get_ctx().new_dynamic_size()
    summary = embeddings.new_empty(sessions, embeddings.shape[1], dtype=weights[0].dtype)
    tokens = embeddings.shape[0] if json.loads(settings).get("own_session") else 0
    own = summary.new_empty(tokens, embeddings.shape[1])
    return summary, times.new_empty(sessions + 1, dtype=torch.int64), own


def traced_context(
    sem: SessionEnhancementModule,
    embeddings: Tensor,
    offsets: Tensor,
    timestamps: Tensor,
    *,
    plan: None = None,
) -> SessionContext:
    """`SessionEnhancementModule.context` as one node, which makes its plan itself."""
    settings = json.dumps(sem_settings(sem))
    weights = list(sem.parameters())
    summary, session_offsets, own = _context(embeddings, offsets, timestamps, weights, settings)
    return SessionContext(summary, session_offsets, own if sem.own_session else None)
