"""Every backend of every operator against naive.py in float64: value, gradient and repeatability.

One table of cases per operator; `test_hstu_attention.py` and `test_compact.py` hold those of the
two operators with tables of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from triton_device import DEVICE, offsets_of

from hpgr_plugin.ops import jagged
from hpgr_plugin.ops.dispatch import set_backends
from hpgr_plugin.ops.hstu_attention import AttentionSpec
from hpgr_plugin.ops.hstu_layer import (
    LayerForm,
    LayerWeights,
    candidate_layer,
    hstu_layer,
)
from hpgr_plugin.ops.item_softmax import mean_cross_entropy
from hpgr_plugin.ops.preference_plan import plan_preferences
from hpgr_plugin.ops.session_pool import PoolWeights, Spans, add_context, session_pool

EDGES = {
    "random": [5, 2, 9, 1, 7],
    "empty-rows": [0, 4, 0, 0, 33, 0],
    "one-item": [1],
    "all-empty": [0, 0],
    "longest": [1, 70, 0],
}


class Case(NamedTuple):
    """Outputs of one call, given its backend and floating-point inputs."""

    run: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    gradients: bool = True


def randn(*sizes: int) -> Tensor:
    return 0.4 * torch.randn(*sizes, device=DEVICE)


def plan_case(
    lengths: list[int], counts: list[int], *, timed: bool = False, **settings: Any
) -> Case:
    total, offsets = sum(lengths), (offsets_of(lengths), offsets_of(counts))
    times = torch.cat([torch.randint(0, 20, (n,)).sort().values for n in lengths]).to(DEVICE)
    now = torch.randint(0, 25, (sum(counts),), device=DEVICE)
    given = {"history_timestamps": times, "candidate_timestamps": now} if timed else {}

    def run(backend: str, history: Tensor, candidates: Tensor) -> tuple[Tensor, ...]:
        plan = plan_preferences(history, candidates, *offsets, **settings, **given, backend=backend)
        return plan.index, plan.weights, plan.offsets

    # Scores of whole numbers are exact in any order of summation, and tie often.
    numbers = (torch.randint(-1, 2, (n, 6), device=DEVICE).float() for n in (total, sum(counts)))
    return Case(run, tuple(numbers), gradients=False)


def pool_case(lengths: list[int], size: int, num_heads: int) -> Case:
    total, head_dim = sum(lengths) + 3, size // num_heads
    lengths = [n for n in lengths if n]
    # Sessions lie apart, in an order of their own.
    starts = offsets_of(lengths)[:-1] + 2
    spans = Spans(starts.flip(0), torch.tensor(lengths, device=DEVICE, dtype=torch.int64).flip(0))
    heads = [randn(num_heads, head_dim, size), randn(num_heads, head_dim)]

    def run(backend: str, tokens: Tensor, position: Tensor, cls: Tensor, *weights: Tensor) -> Any:
        pooled = session_pool(tokens, position, cls, PoolWeights(*weights), spans, backend=backend)
        place = torch.arange(len(starts)) if pooled.place is None else pooled.place
        return pooled.lead[place.to(DEVICE)], pooled.means[:, place.to(DEVICE)]

    inputs = randn(total, size), randn(80, size), randn(size), randn(size), randn(size)
    return Case(run, (*inputs, *heads, randn(num_heads, head_dim, size)))


def context_case(lengths: list[int]) -> Case:
    offsets = offsets_of(lengths)

    def run(backend: str, tokens: Tensor, context: Tensor, gate: Tensor) -> tuple[Tensor]:
        return (add_context(tokens, context, gate, offsets, backend=backend),)

    return Case(run, (randn(sum(lengths), 24), randn(len(lengths), 24), randn(24)))


def softmax_case(rows: int, items: int, with_bias: bool, chunk: int | None) -> Case:
    targets = torch.randint(0, items, (rows,), device=DEVICE)

    def run(backend: str, hidden: Tensor, table: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
        return mean_cross_entropy(hidden, table, targets, *bias, chunk_bytes=chunk, backend=backend)

    bias = (randn(items),) if with_bias else ()
    return Case(run, (randn(rows, 8), randn(items, 8), *bias))


def layer_weights(width: int, hidden: int, attention: int) -> LayerWeights:
    return LayerWeights(
        randn(width), randn(width), randn(width, 2 * (hidden + attention)),
        randn(2 * (hidden + attention)), randn(hidden), randn(hidden), randn(3 * hidden, width),
    )  # fmt: skip


def layer_case(lengths: list[int], which: str, mask_position: str = "post") -> Case:
    total, longest = sum(lengths), max(lengths)
    spec = AttentionSpec(
        offsets=offsets_of(lengths), max_length=longest, alpha=0.25, norm_length=9.0,
        column_weights=torch.rand(total, device=DEVICE), mask_position=mask_position,
    )  # fmt: skip
    form = LayerForm(2)
    inputs = (randn(total, 24), *layer_weights(24, 32, 64))

    def whole(backend: str, x: Tensor, *weights: Tensor) -> tuple[Tensor]:
        return (hstu_layer(x, LayerWeights(*weights), spec, form, backend=backend),)

    asked = [min(n, 2) for n in lengths]
    ends = offsets_of(lengths)[1:].tolist()
    rows = [end - n + i for end, n in zip(ends, asked, strict=True) for i in range(n)]
    suffix = spec.replace(query_offsets=offsets_of(asked), max_query_length=2)

    def last(backend: str, x: Tensor, *weights: Tensor) -> tuple[Tensor]:
        place = torch.tensor(rows, dtype=torch.int64, device=DEVICE)
        chosen = LayerWeights(*weights), suffix, form
        return (hstu_layer(x, *chosen, rows=place, backend=backend),)

    counts = [(2, 0, 3)[b % 3] for b in range(len(lengths))]
    reading = spec.replace(
        query_offsets=offsets_of(counts), max_query_length=3, causal=False, column_weights=None,
        row_weights=torch.rand(sum(counts), longest, device=DEVICE),
    )  # fmt: skip
    dense = spec.replace(column_weights=None)

    def shared(backend: str, x: Tensor, own: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        chosen = LayerWeights(*weights), (dense, reading), form
        final = which == "last candidates"
        read = candidate_layer((x, own), *chosen, last=final, backend=backend)
        return read[1:] if final else read

    if which == "all":
        return Case(whole, inputs)
    if which == "last":
        return Case(last, inputs)
    return Case(shared, (inputs[0], randn(sum(counts), 24), *inputs[1:]))


def jagged_case(lengths: list[int], width: int) -> Case:
    offsets, total = offsets_of(lengths), sum(lengths)

    def run(backend: str, values: Tensor, dense: Tensor) -> tuple[Tensor, ...]:
        known = "torch" if values.dtype == torch.float64 and backend == "fbgemm" else backend
        set_backends({"jagged": known})
        padded = jagged.jagged_to_padded_dense(values, offsets, width, -2.0)
        return padded, jagged.dense_to_jagged(dense, offsets, total)

    return Case(run, (randn(total, 3), randn(len(lengths), width, 3)))


PLANS: list[tuple[list[int], dict[str, Any]]] = [
    ([1, 1, 1, 1, 1], {"top_k": 4, "sigma": 1.0, "timed": True}),
    ([1, 1, 1, 1, 1], {"top_k": 3, "sigma": 0.2, "recent": 5}),
    ([1, 1, 1, 1, 1], {"top_k": 50, "sigma": 2.0, "recent": 2}),
    ([0, 1, 0, 1, 1], {"top_k": 0, "sigma": 2.0, "recent": 4}),
    ([2, 0, 3, 1, 17], {"top_k": 4, "sigma": 1.0}),
    ([2, 0, 3, 1, 2], {"top_k": 3, "sigma": 0.2, "recent": 5, "timed": True}),
    ([2, 0, 3, 1, 2], {"top_k": 50, "sigma": 2.0, "recent": 2}),
    ([0, 2, 0, 3, 1], {"top_k": 0, "sigma": 2.0, "recent": 4}),
]
SOFTMAXES = [
    (7, 23, True, None),
    (7, 23, False, 23 * 4 * 3),
    (1, 2, True, 0),
    (0, 5, True, None),
    (9, 200, True, 200 * 4),
]
CASES: dict[str, dict[str, Callable[[], Case]]] = {
    "preference_plan": {
        f"{counts} {settings}": lambda c=counts, s=settings: plan_case([0, 1, 5, 33, 70], c, **s)
        for counts, settings in PLANS
    }
    | {
        f"{name}": lambda n=lengths: plan_case(n, [2, 0, 1, 3, 0, 1][: len(n)], top_k=2)
        for name, lengths in EDGES.items()
    },
    "session_pool": {
        f"{name} {size}/{heads}": lambda n=lengths, s=size, h=heads: pool_case(n, s, h)
        for name, lengths in EDGES.items()
        for size, heads in ((24, 3), (32, 1))
        if size == 24 or name == "random"
    }
    | {f"context {name}": lambda n=lengths: context_case(n) for name, lengths in EDGES.items()},
    "item_softmax": {
        f"{rows}x{items} bias={bias} chunk={chunk}": lambda r=rows, i=items, b=bias, c=chunk: (
            softmax_case(r, i, b, c)
        )
        for rows, items, bias, chunk in SOFTMAXES
    },
    "hstu_layer": {
        f"all {name}": lambda n=lengths: layer_case(n, "all") for name, lengths in EDGES.items()
    }
    | {
        f"{which} {name}": lambda n=EDGES[name], w=which: layer_case(n, w)
        for which in ("last", "candidates", "last candidates")
        for name in ("random", "empty-rows")
    }
    | {"all pre": lambda: layer_case(EDGES["random"], "all", "pre")},
    "jagged": {
        f"{name} {width}": lambda n=lengths, w=width: jagged_case(n, w)
        for name, lengths in EDGES.items()
        for width in (1, 70)
    },
}
BACKENDS = dict.fromkeys(CASES, ("triton", "torch")) | {"jagged": ("fbgemm", "torch")}


@pytest.mark.usefixtures("poisoned_memory", "use_backends")
@pytest.mark.parametrize(
    ("operator", "backend", "case"),
    [(name, b, case) for name, cases in CASES.items() for b in BACKENDS[name] for case in cases],
)
def test_a_backend_equals_the_loops(operator: str, backend: str, case: str) -> None:
    torch.manual_seed(0)
    run, inputs, gradients = CASES[operator][case]()
    got = _step(run, backend, inputs, gradients)
    # The interpreter is slow, and has no threads that could finish in another order.
    interpreted = backend == "triton" and DEVICE == "cpu"
    again = got if interpreted else _step(run, backend, inputs, gradients)
    wanted = _step(run, "naive", tuple(x.double() for x in inputs), gradients)
    for ours, repeated, theirs in zip(got, again, wanted, strict=True):
        assert torch.equal(ours, repeated)
        assert ours.shape == theirs.shape
        if ours.is_floating_point():
            scale = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0
            torch.testing.assert_close(ours.double() / scale, theirs.double() / scale,
                                       rtol=2e-4, atol=2e-5)  # fmt: skip
        else:
            assert torch.equal(ours, theirs)


def _step(
    run: Callable[..., tuple[Tensor, ...]], backend: str, inputs: tuple[Tensor, ...], grad: bool
) -> list[Tensor]:
    """Outputs, and the gradients of all inputs by fixed weights of the outputs."""
    xs = [x.detach().clone().requires_grad_(grad) for x in inputs]
    outputs = run(backend, *xs)
    if not grad:
        return list(outputs)
    generator = torch.Generator().manual_seed(1)
    loss = xs[0].new_zeros(())
    for y in outputs:
        if y.requires_grad:
            draw = torch.randn(y.shape, generator=generator, dtype=torch.float64)
            loss = loss + (y * draw.to(y)).sum()
    if not loss.requires_grad:
        return list(outputs)
    slopes = torch.autograd.grad(loss, xs, allow_unused=True)
    # An input without influence has gradient zero, which autograd reports as None.
    zeros = (torch.zeros_like(x) if g is None else g for x, g in zip(xs, slopes, strict=True))
    return [y.detach() for y in outputs] + list(zeros)
