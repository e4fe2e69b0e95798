"""Cached inference: keys and values of the history once, candidates later."""

from typing import Any

import pytest
import torch
from small_ranker import WIDTH, build
from torch import Tensor

from hpgr_plugin.components.attention_hooks import (
    HookInputs,
    PreferenceGuidedSparseAttention,
    StochasticLength,
)
from hpgr_plugin.hosts.dlrm_v3 import DlrmHSTU
from hpgr_plugin.hosts.dlrm_v3.request import Request
from hpgr_plugin.ops.compact.parts import sequence_parts

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("float64_operators")]

CONTEXTUAL, LENGTHS, DELTA = 2, torch.tensor([6, 0, 9]), 2
NUM_TARGETS = torch.full_like(LENGTHS, DELTA)


def rows_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers of `[contextual | history]` and of the candidates."""
    offsets = offsets_of(LENGTHS + CONTEXTUAL + DELTA)
    row = torch.arange(len(x))
    is_candidate = torch.zeros(len(x), dtype=torch.bool)
    for end in offsets[1:].tolist():
        is_candidate[end - DELTA : end] = True
    return row[~is_candidate], row[is_candidate]


def offsets_of(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def prefill(stack: Any, x: Tensor) -> None:
    lengths = LENGTHS + CONTEXTUAL
    stack(
        x=x,
        x_lengths=lengths,
        x_offsets=offsets_of(lengths),
        max_seq_len=int(lengths.max()) + DELTA,  # the n of 1/n, as in the pass without a cache
        num_targets=torch.zeros_like(lengths),
        max_kv_caching_len=int(lengths.max()),
        kv_caching_lengths=lengths,
    )


@pytest.mark.parametrize("mask_position", ["post", "pre"])
def test_shared_history_gives_the_same_with_and_without_the_cache(mask_position: str) -> None:
    hook = PreferenceGuidedSparseAttention(
        top_k=2, sigma=1.0, layout="shared_history", mask_position=mask_position
    )
    model = build(DlrmHSTU, dtype=torch.float64, attention_hook=hook).eval()
    transducer, stack = model._hstu_transducer, model._hstu_transducer._stu_module
    seq_lengths = LENGTHS + CONTEXTUAL + DELTA
    total, num_history = int(seq_lengths.sum()), int(LENGTHS.sum())
    x = torch.randn(total, WIDTH, dtype=torch.float64)
    raw = {
        "history_embeddings": torch.randn(num_history, 4, dtype=torch.float64),
        "candidate_embeddings": torch.randn(len(LENGTHS) * DELTA, 4, dtype=torch.float64),
        "history_timestamps": torch.arange(num_history),
        "candidate_timestamps": torch.full((len(LENGTHS) * DELTA,), 11),
    }
    offsets = {"history_offsets": offsets_of(LENGTHS), "candidate_offsets": offsets_of(NUM_TARGETS)}
    plan = hook.plan(HookInputs(**raw, **offsets))
    parts = sequence_parts(
        offsets_of(seq_lengths), NUM_TARGETS, contextual_len=CONTEXTUAL, total_rows=total
    )
    with transducer.requested(Request(parts, plan, DELTA, "shared_history", mask_position)):
        full = transducer._hstu_compute(
            int(seq_lengths.max()),
            seq_lengths,
            offsets_of(seq_lengths),
            torch.zeros(total, dtype=torch.int64),
            x,
            NUM_TARGETS,
        )
    history, candidates = rows_of(x)
    prefill(stack, x[history])
    with model.cached_preferences(**raw, history_lengths=LENGTHS, num_candidates=NUM_TARGETS):
        cached = stack.cached_forward(x[candidates], NUM_TARGETS)
    torch.testing.assert_close(cached, full, rtol=1e-6, atol=1e-6)


def test_shared_history_without_a_plan_is_an_error() -> None:
    model = build(
        DlrmHSTU, attention_hook=PreferenceGuidedSparseAttention(layout="shared_history")
    ).eval()
    stack = model._hstu_transducer._stu_module
    prefill(stack, torch.randn(int((LENGTHS + CONTEXTUAL).sum()), WIDTH))
    with pytest.raises(RuntimeError, match="cached_preferences"):
        stack.cached_forward(torch.randn(len(LENGTHS) * DELTA, WIDTH), NUM_TARGETS)


def test_per_candidate_refuses_the_cache() -> None:
    hook = PreferenceGuidedSparseAttention(layout="per_candidate")
    model = build(DlrmHSTU, attention_hook=hook).eval()
    stack = model._hstu_transducer._stu_module
    with pytest.raises(RuntimeError, match='layout "per_candidate"'):
        prefill(stack, torch.randn(int((LENGTHS + CONTEXTUAL).sum()), WIDTH))
    with pytest.raises(RuntimeError, match='layout "per_candidate"'):
        stack.cached_forward(torch.randn(len(LENGTHS) * DELTA, WIDTH), NUM_TARGETS)
    nothing = torch.zeros(0, 4)
    with (
        pytest.raises(RuntimeError, match="'per_candidate'"),
        model.cached_preferences(
            history_embeddings=nothing,
            candidate_embeddings=nothing,
            history_lengths=LENGTHS,
            num_candidates=NUM_TARGETS,
        ),
    ):
        pass


def test_stochastic_length_leaves_the_cache_alone() -> None:
    torch.manual_seed(0)
    models = [
        build(DlrmHSTU, attention_hook=hook).eval() for hook in (StochasticLength(alpha=1.5), None)
    ]
    x = torch.randn(int((LENGTHS + CONTEXTUAL).sum()), WIDTH)
    delta = torch.randn(len(LENGTHS) * DELTA, WIDTH)
    outputs = []
    for model in models:
        stack = model._hstu_transducer._stu_module
        prefill(stack, x)
        outputs.append(stack.cached_forward(delta, NUM_TARGETS))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
