"""PGSA in the host's layers against the naive loops: value and gradient, float64, CPU."""

from typing import Any, NamedTuple

import pytest
import torch
from generative_recommenders.ops.hstu_attention import hstu_mha
from small_ranker import WIDTH, build, small_config
from torch import Tensor

from hpgr_plugin.components.attention_hooks import PreferenceGuidedSparseAttention
from hpgr_plugin.hosts.dlrm_v3 import DlrmHSTU
from hpgr_plugin.hosts.dlrm_v3.request import Request
from hpgr_plugin.ops.compact.parts import sequence_parts, short_sequences
from hpgr_plugin.ops.hstu_attention import naive as naive_attention
from hpgr_plugin.ops.preference_plan import PreferencePlan, plan_preferences

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("float64_operators")]

SHAPES = {
    "random": ([7, 3, 11], [2, 1, 3]),
    "empty-history": ([0, 5, 0], [1, 2, 3]),
    "one-item": ([1], [1]),
    "shorter-than-k": ([2, 3], [2, 2]),
    "no-candidates": ([4, 6], [0, 2]),
    "one-long": ([1, 40], [1, 4]),
}
CONTEXTUAL = 2
# The host's longest sequence, more than any here: its 1/n is a constant of the batch.
MAX_SEQ_LEN = 50


class Case(NamedTuple):
    """Sequences as the host hands them to its layers, and a plan for them."""

    x: Tensor
    seq_lengths: Tensor
    num_targets: Tensor
    timestamps: Tensor
    plan: PreferencePlan

    def offsets(self) -> Tensor:
        return torch.cat([self.seq_lengths.new_zeros(1), self.seq_lengths.cumsum(0)])


def make_case(
    shape: tuple[list[int], list[int]], *, top_k: int = 3, ties: bool = False, **settings: Any
) -> Case:
    lengths, candidates = (torch.tensor(part) for part in shape)
    seq_lengths = lengths + candidates + CONTEXTUAL
    offsets = [torch.cat([n.new_zeros(1), n.cumsum(0)]) for n in (lengths, candidates)]
    history = torch.randn(int(lengths.sum()), 6, dtype=torch.float64)
    shown = torch.randn(int(candidates.sum()), 6, dtype=torch.float64)
    if ties:
        history, shown = torch.ones_like(history), torch.ones_like(shown)
    plan = plan_preferences(history, shown, *offsets, top_k=top_k, **{"sigma": 1.0, **settings})
    total = int(seq_lengths.sum())
    x = torch.randn(total, WIDTH, dtype=torch.float64, requires_grad=True)
    return Case(x, seq_lengths, candidates, torch.zeros(total, dtype=torch.int64), plan)


def make_model(layout: str, mask_position: str, **config: Any) -> Any:
    hook = PreferenceGuidedSparseAttention(layout=layout, mask_position=mask_position)
    model = build(DlrmHSTU, dtype=torch.float64, attention_hook=hook, config=small_config(**config))
    assert model._hstu_transducer.contextual_seq_len == CONTEXTUAL
    return model


def computed(model: Any, case: Case) -> Tensor:
    """Candidate rows of the stack, through the adapter."""
    hook = model.attention_hook
    parts = sequence_parts(
        case.offsets(), case.num_targets, contextual_len=CONTEXTUAL, total_rows=len(case.x)
    )
    request = Request(
        parts, case.plan, int(case.num_targets.max()), hook.layout, hook.mask_position
    )
    transducer = model._hstu_transducer
    with transducer.requested(request):
        candidates: Tensor = transducer._hstu_compute(
            MAX_SEQ_LEN,
            case.seq_lengths,
            case.offsets(),
            case.timestamps,
            case.x,
            case.num_targets,
        )
    return candidates


def expected(model: Any, case: Case) -> Tensor:
    """The same by the naive attention, nothing gathered or shortened."""
    hook, offsets = model.attention_hook, case.offsets().tolist()
    layers = list(model._hstu_transducer._stu_module._stu_layers)
    outputs, candidate, history_start = [case.x.new_zeros(0, WIDTH)], 0, 0
    for b, count in enumerate(case.num_targets.tolist()):
        first = offsets[b] + CONTEXTUAL
        history = int(case.seq_lengths[b]) - count - CONTEXTUAL
        for k in range(count):
            kept = slice(int(case.plan.offsets[candidate]), int(case.plan.offsets[candidate + 1]))
            mask = torch.zeros(history, dtype=torch.float64)
            mask[case.plan.index[kept] - history_start] = case.plan.weights[kept]
            ones = torch.ones(CONTEXTUAL, dtype=torch.float64)
            mask = torch.cat([ones, mask, torch.ones(1, dtype=torch.float64)])
            x = torch.cat(
                [case.x[offsets[b] : first + history], case.x[first + history + k].unsqueeze(0)]
            )
            for layer in layers:
                x = _naive_layer(layer, x, mask, hook.layout, hook.mask_position)
            outputs.append(x[-1:])
            candidate += 1
        history_start += history
    return torch.cat(outputs)


def _naive_layer(layer: Any, x: Tensor, mask: Tensor, layout: str, mask_position: str) -> Tensor:
    u, q, k, v = layer._project(x)
    pair = torch.ones(len(x), len(x), dtype=torch.float64)
    pair[-1] = mask
    attention = naive_attention.hstu_attention(
        q,
        k,
        v,
        torch.tensor([0, len(x)]),
        alpha=layer._attn_alpha,
        norm_length=MAX_SEQ_LEN,
        column_weights=mask if layout == "per_candidate" else None,
        row_weights=pair if layout == "shared_history" else None,
        mask_position=mask_position,
    )
    return layer._output(attention, u, x)


def gradients(output: Tensor, model: Any, case: Case) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    loss = (output * torch.randn(output.shape, generator=generator, dtype=torch.float64)).sum()
    parameters = list(model._hstu_transducer._stu_module.parameters())
    return list(torch.autograd.grad(loss, [case.x, *parameters], materialize_grads=True))


@pytest.mark.parametrize("mask_position", ["post", "pre"])
@pytest.mark.parametrize("layout", ["per_candidate", "shared_history"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_stack_is_the_naive_stack(shape: Any, layout: str, mask_position: str) -> None:
    case, model = make_case(shape, recent=1), make_model(layout, mask_position)
    mine, theirs = computed(model, case), expected(model, case)
    # Layer norms of the host run in float32, whatever goes in: an ulp of that is 6e-8.
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    for ours, naives in zip(
        gradients(mine, model, case), gradients(theirs, model, case), strict=True
    ):
        torch.testing.assert_close(ours, naives, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["per_candidate", "shared_history"])
@pytest.mark.parametrize(
    ("settings", "config"),
    [({"ties": True}, {}), ({"top_k": 0, "recent": 2}, {}), ({}, {"hstu_group_norm": True})],
    ids=["all-ties", "recent-only", "group-norm"],
)
def test_stack_is_the_naive_stack_with_other_settings(
    layout: str, settings: dict[str, Any], config: dict[str, Any]
) -> None:
    case = make_case(([9, 4], [2, 2]), **settings)
    model = make_model(layout, "post", **config)
    torch.testing.assert_close(computed(model, case), expected(model, case), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_attention_on_gathered_rows_is_naive_to_float64(shape: Any) -> None:
    """The identity itself, no layer norm in the way: scaled values on the host's kernel."""
    case = make_case(shape, recent=1)
    parts = sequence_parts(
        case.offsets(), case.num_targets, contextual_len=CONTEXTUAL, total_rows=len(case.x)
    )
    rows = short_sequences(parts, case.plan, per_user=False)
    full = [
        torch.randn(len(case.x), 2, d, dtype=torch.float64, requires_grad=True) for d in (4, 4, 3)
    ]
    q, k, v = (part[rows.index] for part in full)
    offsets = torch.cat([rows.lengths.new_zeros(1), rows.lengths.cumsum(0)])
    mine = hstu_mha(
        max_seq_len=rows.max_len,
        alpha=0.3,
        q=q,
        k=k,
        v=v * (rows.weights * rows.max_len / MAX_SEQ_LEN).view(-1, 1, 1),
        seq_offsets=offsets,
        num_targets=rows.num_targets,
    )[offsets[1:] - 1]
    theirs = _naive_rows(full, case)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
    both = [
        torch.autograd.grad(output.square().sum(), full, materialize_grads=True)
        for output in (mine, theirs)
    ]
    for ours, naives in zip(*both, strict=True):
        torch.testing.assert_close(ours, naives, rtol=1e-11, atol=1e-13)


def _naive_rows(full: list[Tensor], case: Case) -> Tensor:
    outputs, candidate, history_start = [full[2].new_zeros(0, *full[2].shape[1:])], 0, 0
    offsets = case.offsets().tolist()
    for b, count in enumerate(case.num_targets.tolist()):
        first = offsets[b] + CONTEXTUAL
        history = int(case.seq_lengths[b]) - count - CONTEXTUAL
        for k in range(count):
            kept = slice(int(case.plan.offsets[candidate]), int(case.plan.offsets[candidate + 1]))
            weights = torch.zeros(history + CONTEXTUAL + 1, dtype=torch.float64)
            weights[:CONTEXTUAL] = weights[-1] = 1.0
            weights[case.plan.index[kept] - history_start + CONTEXTUAL] = case.plan.weights[kept]
            rows = [*range(offsets[b], first + history), first + history + k]
            outputs.append(
                naive_attention.hstu_attention(
                    *(part[rows] for part in full),
                    torch.tensor([0, len(rows)]),
                    alpha=0.3,
                    norm_length=MAX_SEQ_LEN,
                    column_weights=weights,
                )[-1:]
            )
            candidate += 1
        history_start += history
    return torch.cat(outputs)
