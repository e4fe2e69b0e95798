"""Every backend of HSTU attention against the loops of naive.py, in value and gradient."""

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_device import DEVICE, offsets_of

from hpgr_plugin.ops.hstu_attention import (
    AttentionSpec,
    Places,
    PositionTimeBias,
    Visibility,
    hstu_attention,
)
from hpgr_plugin.ops.hstu_attention.torch import bias_buckets
from hpgr_plugin.ops.hstu_attention.triton import attention_backward, attention_forward

LENGTHS = [0, 1, 40, 3]
TARGETS = [0, 1, 5, 3]
TOTAL = sum(LENGTHS)
BACKENDS = ["triton", "torch"]


def spec_of(lengths: list[int], dtype: torch.dtype = torch.int64, **fields: Any) -> AttentionSpec:
    fields = {"alpha": 0.3, "norm_length": 50.0, "max_length": max(lengths), **fields}
    return AttentionSpec(offsets=offsets_of(lengths, dtype), **fields)


def inputs(rows: int, columns: int, size: int = 16, values: int = 16) -> list[Tensor]:
    shapes = ((rows, 2, size), (columns, 2, size), (columns, 2, values))
    return [torch.randn(s, device=DEVICE, requires_grad=True) for s in shapes]


def double(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in tensors]


def assert_same(ours: Tensor, xs: list[Tensor], reference: Tensor, exact: list[Tensor]) -> None:
    grad = torch.randn_like(ours)
    got = (ours, *torch.autograd.grad(ours, xs, grad))
    wanted = (reference, *torch.autograd.grad(reference, exact, grad.double()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def suffix_rows(asked: list[int]) -> list[int]:
    """The last `asked[b]` rows of every sequence."""
    ends = offsets_of(LENGTHS).tolist()[1:]
    return [end - count + i for end, count in zip(ends, asked, strict=True) for i in range(count)]


@dataclass
class Case:
    """A spec, how many queries there are, and a bias."""

    spec: AttentionSpec
    queries: int = TOTAL
    bias: PositionTimeBias | None = None


def make_case(name: str) -> Case:
    weights = torch.rand(TOTAL, device=DEVICE)
    places = Places(
        torch.cat([torch.arange(n) * 3 for n in LENGTHS]).to(DEVICE),
        torch.cat([torch.arange(n) ** 4 for n in LENGTHS]).to(DEVICE),
    )
    bias = PositionTimeBias(
        torch.randn(64, device=DEVICE), torch.randn(32, device=DEVICE), exact_positions=16
    )
    order = Visibility(
        key_order=torch.randint(-1, 6, (TOTAL,), device=DEVICE),
        query_order=torch.randint(0, 6, (TOTAL,), device=DEVICE),
    )
    asked = [0, 1, 23, 2]
    rows = torch.tensor(suffix_rows(asked), device=DEVICE)
    some = {"query_offsets": offsets_of(asked), "max_query_length": 23}
    matrix = torch.rand(len(rows), 40, device=DEVICE)
    cases = {
        "plain": lambda: Case(spec_of(LENGTHS, torch.int32)),
        "columns": lambda: Case(spec_of(LENGTHS, column_weights=weights)),
        "columns-pre-targets": lambda: Case(
            spec_of(
                LENGTHS,
                column_weights=weights,
                mask_position="pre",
                num_targets=torch.tensor(TARGETS, device=DEVICE),
            )
        ),
        "targets": lambda: Case(spec_of(LENGTHS, num_targets=torch.tensor(TARGETS, device=DEVICE))),
        "last-rows": lambda: Case(spec_of(LENGTHS, column_weights=weights, **some), len(rows)),
        "all-columns-by-row": lambda: Case(
            spec_of(LENGTHS, causal=False, row_weights=matrix, **some), len(rows)
        ),
        "bias": lambda: Case(spec_of(LENGTHS, places=places), bias=bias),
        "bias-of-last-rows": lambda: Case(spec_of(LENGTHS, places=places, **some), len(rows), bias),
        "bias-by-two-positions": lambda: Case(
            spec_of(
                LENGTHS,
                places=places._replace(query_positions=places.positions.flip(0)),
                visibility=order,
            ),
            bias=bias,
        ),
        "bias-targets": lambda: Case(
            spec_of(LENGTHS, places=places, num_targets=torch.tensor(TARGETS, device=DEVICE)),
            bias=bias,
        ),
        "bias-all-columns": lambda: Case(
            spec_of(LENGTHS, places=places, causal=False, column_weights=weights), bias=bias
        ),
        "bias-pre-both-weights": lambda: Case(
            spec_of(
                LENGTHS,
                places=places,
                visibility=order,
                column_weights=weights,
                row_weights=torch.rand(TOTAL, 40, device=DEVICE),
                mask_position="pre",
            ),
            bias=bias,
        ),
        "weights-of-some-rows": lambda: Case(
            spec_of(
                LENGTHS,
                places=places,
                visibility=order,
                row_weights=matrix,
                weight_offsets=offsets_of(asked),
            ),
            bias=bias,
        ),
        "weights-of-some-last-rows": lambda: Case(
            spec_of(
                LENGTHS, row_weights=matrix[:4], weight_offsets=offsets_of([0, 0, 4, 0]), **some
            ),
            len(rows),
        ),
        "chosen-rows": lambda: Case(
            spec_of(
                LENGTHS,
                places=places,
                visibility=order,
                query_rows=torch.tensor([3, 1, 40, 41], device=DEVICE),
                query_offsets=offsets_of([0, 0, 3, 1]),
                max_query_length=3,
            ),
            4,
            bias,
        ),
        "visibility": lambda: Case(spec_of(LENGTHS, visibility=order)),
        "visibility-by-row-pre": lambda: Case(
            spec_of(
                LENGTHS,
                visibility=order,
                query_rows=rows,
                row_weights=matrix,
                mask_position="pre",
                places=places,
                **some,
            ),
            len(rows),
            bias,
        ),
    }
    return cases[name]()


CASES = [
    "plain",
    "columns",
    "columns-pre-targets",
    "targets",
    "last-rows",
    "all-columns-by-row",
    "bias",
    "bias-of-last-rows",
    "bias-by-two-positions",
    "bias-targets",
    "bias-all-columns",
    "bias-pre-both-weights",
    "weights-of-some-rows",
    "weights-of-some-last-rows",
    "chosen-rows",
    "visibility",
    "visibility-by-row-pre",
]


@pytest.mark.parametrize(
    ("backend", "case"),
    list(itertools.product(BACKENDS, CASES)),
)
def test_value_and_gradient_are_those_of_naive(
    backend: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_case(case)
    xs = inputs(made.queries, TOTAL)
    exact = double(xs)
    bias, exact_bias = made.bias, None
    if bias is not None:
        tables = [x.requires_grad_() for x in bias[:2]]
        xs, exact_tables = xs + tables, double(tables)
        exact, exact_bias = exact + exact_tables, PositionTimeBias(*exact_tables, 16)

    new_empty = Tensor.new_empty
    monkeypatch.setattr(  # an unwritten output shows as NaN
        Tensor,
        "new_empty",
        lambda self, *size, **kwargs: _poisoned(new_empty(self, *size, **kwargs)),
    )
    ours = hstu_attention(*xs[:3], made.spec, bias=bias, backend=backend)
    monkeypatch.undo()

    reference = hstu_attention(*exact[:3], made.spec, bias=exact_bias, backend="naive")
    assert_same(ours, xs, reference, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(4))
def test_random_sequences_with_everything(backend: str, seed: int) -> None:
    """Random lengths, queries, orders, weights and times that lie up to 10^10 seconds apart."""
    draw = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, size: int) -> Tensor:
        return torch.randint(low, high, (size,), generator=draw)

    lengths = integers(0, 50, 4).tolist()
    asked = [int(integers(0, n + 1, 1)) for n in lengths]
    ends = offsets_of(lengths).tolist()[1:]
    rows = [e - c + i for e, c in zip(ends, asked, strict=True) for i in range(c)]
    total, longest = sum(lengths), max(lengths)
    places = Places(
        integers(0, 3000, total).to(DEVICE),
        integers(0, 10**10, total).to(DEVICE),
        integers(0, 3000, total).to(DEVICE),
    )
    spec = spec_of(
        lengths,
        query_offsets=offsets_of(asked),
        max_query_length=max(asked),
        query_rows=torch.tensor(rows, dtype=torch.int64, device=DEVICE),
        visibility=Visibility(integers(-1, 9, total).to(DEVICE), integers(-1, 9, total).to(DEVICE)),
        column_weights=torch.rand(total, generator=draw).to(DEVICE),
        row_weights=torch.rand(len(rows), longest, generator=draw).to(DEVICE),
        mask_position=("post", "pre")[seed % 2],
        places=places,
    )
    tables = [torch.randn(n, generator=draw).to(DEVICE).requires_grad_() for n in (64, 32)]
    xs = [*inputs(len(rows), total), *tables]
    exact = double(xs)

    ours = hstu_attention(
        *xs[:3], spec, bias=PositionTimeBias(*tables, exact_positions=16), backend=backend
    )

    bias = PositionTimeBias(exact[3], exact[4], exact_positions=16)
    assert_same(ours, xs, hstu_attention(*exact[:3], spec, bias=bias, backend="naive"), exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [32, 40])
def test_the_bucket_of_a_time_is_exact_around_powers_of_two(backend: str, size: int) -> None:
    """With values 1 and scores b alone, the output tells the bucket of every difference."""
    apart = [0, *(2**power + near for power in range(1, 34) for near in (-2, -1, 0, 1))]
    tables = torch.zeros(64), torch.arange(float(size)) - 1.0
    outputs = []
    for which in (backend, "naive"):
        bias = PositionTimeBias(*(x.to(DEVICE) for x in tables), exact_positions=16)
        q, k, v = (torch.zeros(2 * len(apart), 1, 16, device=DEVICE) for _ in range(3))
        v[0::2] = 1.0  # only the earlier of two
        spec = spec_of([2] * len(apart), places=_pairs(apart), norm_length=1.0)
        outputs.append(hstu_attention(q, k, v, spec, bias=bias, backend=which)[1::2, 0, 0])
    torch.testing.assert_close(*outputs)
    buckets = torch.tensor([min((1 + x).bit_length() - 1, size - 1) for x in apart]) - 1.0
    torch.testing.assert_close(outputs[0].cpu(), torch.nn.functional.silu(buckets))


def _pairs(apart: list[int]) -> Places:
    """Sequences of two tokens, so many seconds apart."""
    times = torch.tensor([time for seconds in apart for time in (7, 7 + seconds)], device=DEVICE)
    return Places(torch.zeros_like(times), times)


def _poisoned(x: Tensor) -> Tensor:
    return x.fill_(float("nan")) if x.is_floating_point() else x


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_rows_equal_the_last_of_all(backend: str) -> None:
    asked = [0, 1, 1, 1]
    rows = suffix_rows(asked)
    xs = inputs(TOTAL, TOTAL)
    exact = double(xs)
    spec = spec_of(LENGTHS, column_weights=torch.rand(TOTAL, device=DEVICE))
    last = spec.replace(query_offsets=offsets_of(asked), max_query_length=1)

    ours = hstu_attention(xs[0][rows], xs[1], xs[2], last, backend=backend)

    reference = hstu_attention(*exact, spec, backend="naive")
    assert_same(ours, xs, reference[rows], exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_no_sequence_owns_come_out_zero(backend: str) -> None:
    xs = inputs(50, 50, size=16, values=32)

    ours = hstu_attention(*xs, spec_of(LENGTHS, max_length=64), backend=backend)

    assert ours.shape == (50, 2, 32)
    assert not ours[44:].any()
    for gradient in torch.autograd.grad(ours.sum(), xs):
        assert not gradient[44:].any()


def test_padded_sequences_are_a_view() -> None:
    """Equal lengths need no padding: the same numbers, by reshaping only."""
    spec = spec_of([6, 6, 6])
    xs = inputs(18, 18)
    ours = hstu_attention(*xs, spec.replace(padded=True), backend="torch")
    torch.testing.assert_close(ours, hstu_attention(*xs, spec, backend="torch"))


def test_slices_of_one_projection_need_no_copies_of_their_own() -> None:
    spec = spec_of([20, 7])
    projected = torch.randn(27, 3, 2, 16, device=DEVICE, requires_grad=True)
    exact = projected.detach().double().requires_grad_()

    ours = hstu_attention(*projected.unbind(1), spec, backend="triton")

    reference = hstu_attention(*exact.unbind(1), spec, backend="naive")
    assert_same(ours, [projected], reference, [exact])


def test_the_backward_adds_to_what_is_there() -> None:
    """`accumulate`: gradients of keys and values that several queries share."""
    weights = torch.rand(5, 40, device=DEVICE)
    spec = spec_of(
        [0, 40, 3],
        query_offsets=offsets_of([2, 3, 0]),
        max_query_length=3,
        causal=False,
        row_weights=weights,
        exact=True,
    )
    q, k, v = inputs(5, 43)
    output, grad = torch.empty_like(q), torch.randn_like(q)
    held = torch.randn_like(k), torch.randn_like(v)
    dq, dk, dv = torch.empty_like(q), held[0].clone(), held[1].clone()

    attention_forward(q.detach(), k.detach(), v.detach(), output, spec)
    attention_backward(grad, q.detach(), k.detach(), v.detach(), dq, dk, dv, spec, accumulate=True)

    exact = double([q, k, v])
    reference = hstu_attention(*exact, spec, backend="naive")
    wanted = torch.autograd.grad(reference, exact, grad.double())
    assert not output[:2].any()  # a history without items
    for a, b in zip((output, dq, dk - held[0], dv - held[1]), (reference, *wanted), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_bias_buckets_survive_shortening() -> None:
    """The bucket of two tokens is the same whether those between them are there or not."""
    bias = PositionTimeBias(torch.zeros(64), torch.zeros(32), exact_positions=16)
    positions, times = torch.arange(50), torch.arange(50) ** 3

    def buckets(kept: Tensor) -> Tensor:
        spec = AttentionSpec(
            offsets=torch.tensor([0, len(kept)]),
            max_length=len(kept),
            alpha=1.0,
            norm_length=1.0,
            places=Places(positions[kept], times[kept]),
        )
        return bias_buckets(spec, bias)[0]

    whole, kept = buckets(torch.arange(50)), torch.tensor([0, 3, 17, 48, 49])
    assert torch.equal(buckets(kept), whole[kept][:, kept])
    assert whole.max() < 64 * 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_position": "both"}, "mask_position must be 'post' or 'pre', got 'both'"),
        ({"column_weights": torch.ones(3)}, "column_weights must be"),
        ({"row_weights": torch.ones(9, 3)}, "row_weights must be"),
        ({"query_offsets": torch.zeros(2, dtype=torch.int64)}, "query_offsets must be"),
    ],
    ids=["mask-position", "columns", "rows", "queries"],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hstu_attention(*inputs(9, 9), spec_of([4, 5]).replace(**change))


def test_a_bias_needs_places() -> None:
    bias = PositionTimeBias(torch.zeros(64), torch.zeros(32), exact_positions=16)
    with pytest.raises(ValueError, match="a bias needs places"):
        hstu_attention(*inputs(9, 9), spec_of([4, 5]), bias=bias)


def test_an_unknown_head_size_is_refused_only_by_the_kernels() -> None:
    xs = inputs(9, 9, size=12, values=12)
    with pytest.raises(ValueError, match="head size of q and k is 12"):
        hstu_attention(*xs, spec_of([4, 5]), backend="triton")
    hstu_attention(*xs, spec_of([4, 5]), backend="torch")
